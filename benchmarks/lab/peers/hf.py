"""transformers: `generate` over one batch, or its continuous batching. The format is MODE/DTYPE."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.lab.peers.talk import Answers, Tokens, serve

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PAGE_TOKENS = 32  # without a flash kernel the mask is dense over all pages: small ones, few
_SPARE_PAGES = 8


class Transformers:
    """A model as `from_pretrained` gives it, with sdpa attention."""

    def __init__(self, folder: str, form: str, threads: int) -> None:
        self._mode, _, dtype = form.partition("/")
        torch.set_num_threads(threads)
        self._module: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_DTYPES[dtype], attn_implementation="sdpa"
        )
        self.facts: dict[str, Any] = {"version": transformers.__version__}

    @torch.inference_mode()
    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        torch.set_num_threads(threads)
        config = GenerationConfig(  # type: ignore[no-untyped-call]  # no hints there
            do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0, bos_token_id=0
        )
        run = self._batched if self._mode == "generate" else self._continuous
        return Answers(run(prompts, new, config))

    def _batched(self, prompts: Tokens, new: int, config: GenerationConfig) -> Tokens:
        """Prompts of one length, so that nothing is padded."""
        ids = torch.tensor(prompts)
        self._module.generation_config = config
        whole = self._module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
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


if __name__ == "__main__":
    serve(Transformers)
