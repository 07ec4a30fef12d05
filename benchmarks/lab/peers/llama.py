"""llama.cpp by its batch interface, many sequences in one context. The format is a GGUF type.

Greedy tokens are taken from the logits, and prefill is cut into batches as its server does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.lab.peers.talk import Answers, Tokens, serve

_BATCH_TOKENS = 512
_CONTEXT_TOKENS = 20480  # of all sequences together
_SEQUENCES = 16


class LlamaCpp:
    """One context, emptied after each run."""

    def __init__(self, folder: str, form: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        file = Path(folder) / f"model-{form}.gguf"
        self._model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        assert self._model, f"llama.cpp cannot read {file.name}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = _CONTEXT_TOKENS, _BATCH_TOKENS, 512
        params.n_seq_max, params.kv_unified = _SEQUENCES, True
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp gave no context"
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._rows = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self.facts: dict[str, Any] = {"version": llama_cpp.__version__}

    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        llama_cpp.llama_set_n_threads(self._context, threads, threads)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        answers = self._prefill(prompts)
        lengths = [len(prompt) for prompt in prompts]
        for step in range(new - 1):
            rows = [
                (answer[-1], length + step, number, True)
                for number, (answer, length) in enumerate(zip(answers, lengths, strict=True))
            ]
            for answer, token in zip(answers, self._decode(rows), strict=True):
                answer.append(token)
        return Answers(answers)

    def _prefill(self, prompts: Tokens) -> Tokens:
        """The first token of each prompt."""
        rows = [
            (token, at, number, at == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        first: list[int] = []
        for start in range(0, len(rows), _BATCH_TOKENS):
            first += self._decode(rows[start : start + _BATCH_TOKENS])
        return [[token] for token in first]

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Token, position, sequence, wanted a row -> the likeliest next token of wanted ones."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = wanted
        code = llama_cpp.llama_decode(self._context, batch)
        assert code == 0, f"llama_decode gave {code}"
        likeliest = []
        for at, row in enumerate(rows):
            if row[3]:
                logits = llama_cpp.llama_get_logits_ith(self._context, at)
                likeliest.append(int(np.ctypeslib.as_array(logits, (self._rows,)).argmax()))
        return likeliest


if __name__ == "__main__":
    serve(LlamaCpp)
