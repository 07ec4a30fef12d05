"""transformers: `generate` over one batch, or its continuous batching. The format is MODE/DTYPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.lab.peers.talk import Answers, Guess, Tokens, guessing, serve

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PAGE_TOKENS = 32  # without a flash kernel the mask is dense over all pages: small ones, few
_SPARE_PAGES = 8


class Transformers:
    """A model as `from_pretrained` gives it, with sdpa attention."""

    def __init__(self, folder: str, form: str, threads: int) -> None:
        form, guess = guessing(form)
        self._mode, _, dtype = form.partition("/")
        torch.set_num_threads(threads)
        self._module = _load(Path(folder), dtype)
        self._passes = [0, 0]  # of the target and of its draft
        self._more: dict[str, Any] = {}
        if guess and guess.proposer != "none":
            self._guess(guess, Path(folder).with_name("draft"), dtype)
        self.facts: dict[str, Any] = {"version": transformers.__version__}

    def _guess(self, guess: Guess, draft_folder: Path, dtype: str) -> None:
        """As many guesses each time as were asked for, however sure of them the draft is."""
        self._count_passes(self._module, 0)
        if guess.proposer == "ngram":
            self._more = {"prompt_lookup_num_tokens": guess.count, "max_matching_ngram_size": 5}
            return
        draft = _load(draft_folder, dtype)
        self._count_passes(draft, 1)
        draft.generation_config.num_assistant_tokens = guess.count
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        self._more = {"assistant_model": draft}

    def _count_passes(self, module: Any, at: int) -> None:
        def count(*_: Any) -> None:
            self._passes[at] += 1

        module.register_forward_hook(count)

    @torch.inference_mode()
    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        torch.set_num_threads(threads)
        config = GenerationConfig(  # type: ignore[no-untyped-call]  # no hints there
            do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0, bos_token_id=0
        )
        run = self._batched if self._mode == "generate" else self._continuous
        self._passes[:] = 0, 0
        answers = run(prompts, new, config)
        told = zip(("passes", "drafted"), self._passes, strict=True)
        return Answers(answers, {name: count for name, count in told if count})

    def _batched(self, prompts: Tokens, new: int, config: GenerationConfig) -> Tokens:
        """Prompts of one length, so that nothing is padded."""
        ids = torch.tensor(prompts)
        self._module.generation_config = config
        whole = self._module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            **self._more,
        )
        assert whole.shape[1] == ids.shape[1] + new, "generate stopped early"
        answers: Tokens = whole[:, ids.shape[1] :].tolist()
        return answers

    def _continuous(self, prompts: Tokens, new: int, config: GenerationConfig) -> Tokens:
        pages = sum(-(-(len(prompt) + new) // _PAGE_TOKENS) for prompt in prompts)
        settings = transformers.ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=pages + _SPARE_PAGES,
            max_batch_tokens=512,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        outputs = self._module.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=settings,
            warmup=False,
        )
        numbered = sorted(outputs.items(), key=lambda item: int(item[0].rsplit("_", 1)[1]))
        answers = [list(output.generated_tokens) for _, output in numbered]
        assert all(len(answer) == new for answer in answers), "a request stopped early"
        return answers


def _load(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=_DTYPES[dtype], attn_implementation="sdpa"
    )


if __name__ == "__main__":
    serve(Transformers)
