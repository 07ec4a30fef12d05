"""vLLM on the CPU, in this process, without torch.compile. The format is a dtype.

Where it guesses tokens, nothing of a prompt is kept for the next one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab.peers.talk import Answers, Guess, Tokens, guessing, serve

_set_num_threads = torch.set_num_threads  # vLLM replaces it by one that refuses
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # so that the number of threads can change
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that its CPU time is this process's
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_MOST_CONTEXT = 4096
_COUNTED = {
    "drafts": "num_drafts",
    "drafted": "num_draft_tokens",
    "accepted": "num_accepted_tokens",
}


class Vllm:
    """vLLM's offline interface."""

    def __init__(self, folder: str, form: str, threads: int) -> None:
        os.environ.update(_ENVIRONMENT)
        import vllm

        dtype, guess = guessing(form)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self._guesses = guess is not None and guess.proposer != "none"
        self._always = guess is not None and guess.proposer == "draft"  # every pass but the first
        self._llm = vllm.LLM(
            model=folder,
            dtype=_DTYPES[dtype],
            enforce_eager=True,
            max_model_len=min(_MOST_CONTEXT, config["max_position_embeddings"]),
            seed=0,
            **(_speculating(folder, guess) if guess else {}),
        )
        self._sampling = vllm.SamplingParams
        self.facts: dict[str, Any] = {"version": vllm.__version__, "threads_at_load": threads}

    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        _set_num_threads(threads)
        params = self._sampling(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        before = self._counts()
        outputs = self._llm.generate(asked, params, use_tqdm=False)
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        told = {name: count - before[name] for name, count in self._counts().items()}
        if self._always:
            told["passes"] = told["drafts"] + len(prompts)
        return Answers(answers, {"cached_tokens": cached} | told)

    def _counts(self) -> dict[str, float]:
        """Of guesses since the start."""
        if not self._guesses:
            return {}
        counted = {one.name: one.value for one in self._llm.get_metrics() if hasattr(one, "value")}
        return {name: counted[f"vllm:spec_decode_{own}"] for name, own in _COUNTED.items()}


def _speculating(folder: str, guess: Guess) -> dict[str, Any]:
    plain: dict[str, Any] = {"enable_prefix_caching": False, "disable_log_stats": False}
    if guess.proposer == "none":
        return plain
    config: dict[str, Any] = {"num_speculative_tokens": guess.count}
    if guess.proposer == "draft":
        config |= {"method": "draft_model", "model": str(Path(folder).with_name("draft"))}
    else:
        config |= {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 5}
    return plain | {"speculative_config": config}


if __name__ == "__main__":
    serve(Vllm)
