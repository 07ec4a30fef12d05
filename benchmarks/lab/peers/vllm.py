"""vLLM on the CPU, in this process, without torch.compile. The format is a dtype."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.lab.peers.talk import Answers, Tokens, serve

_set_num_threads = torch.set_num_threads  # vLLM replaces it by one that refuses
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # so that the number of threads can change
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that its CPU time is this process's
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Vllm:
    """vLLM's offline interface."""

    def __init__(self, folder: str, form: str, threads: int) -> None:
        os.environ.update(_ENVIRONMENT)
        import vllm

        self._llm = vllm.LLM(
            model=folder, dtype=_DTYPES[form], enforce_eager=True, max_model_len=4096, seed=0
        )
        self._sampling = vllm.SamplingParams
        self.facts: dict[str, Any] = {"version": vllm.__version__, "threads_at_load": threads}

    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        _set_num_threads(threads)
        params = self._sampling(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(asked, params, use_tqdm=False)
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        return Answers(answers, {"cached_tokens": cached})


if __name__ == "__main__":
    serve(Vllm)
