"""Headgate's engine, driven in its own process like a peer's offline interface.

Every prompt is submitted before the first step, and the engine steps until all have their answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.lab.peers.talk import Answers, Tokens, serve
from cache.tokens import Tokenizer
from policies.schema import Weights
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.loading import load_model
from runtime.sequence import Sampling

_KV_TOKENS = 10752  # holds the largest load, shared prefixes held once


class Ours:
    """One engine for all runs, as a worker keeps it."""

    def __init__(self, folder: str, form: str, threads: int) -> None:
        torch.set_num_threads(threads)
        weights = Weights.model_validate(dict.fromkeys(("attention", "mlp", "head"), form))
        model, where = load_model(
            Path(folder), kv_tokens=_KV_TOKENS, device="cpu", weights=weights, compiles=True
        )
        self._engine = Engine(model, Tokenizer.load(where), emit=lambda _: None)
        self.facts: dict[str, Any] = {"matrix_bytes": model.weights.held_bytes}

    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        torch.set_num_threads(threads)
        engine = self._engine
        sampling = Sampling(temperature=0.0, max_tokens=new, ignore_eos=True)
        keys = engine.submit([Order(prompt, sampling) for prompt in prompts])
        engine.take_orders(wait=False)
        tokens: dict[int, list[int]] = {key: [] for key in keys}
        running = set(keys)
        cached: dict[int, int] = {}
        forward_s = engine.clock.forward_s
        while running:
            for output in engine.step():
                assert output.error is None, output.error
                tokens[output.key] += output.token_ids
                cached[output.key] = output.cached_tokens
                if output.finish_reason:
                    running.discard(output.key)
        facts = {
            "forward_s": engine.clock.forward_s - forward_s,
            "cached_tokens": sum(cached.values()),
        }
        return Answers([tokens[key] for key in keys], facts)


if __name__ == "__main__":
    serve(Ours)
