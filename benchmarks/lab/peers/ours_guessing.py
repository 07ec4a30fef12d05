"""Headgate's engine one prompt after another, guessing in a given way: FORM+PROPOSER/COUNT.

FORM is how steps are computed, `torch` or `compiled`. Nothing of a prompt is kept for the next one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.lab.peers.talk import Answers, Guess, Tokens, guessing, serve
from benchmarks.lab.speculating import OFF, Bench, Way
from runtime.inbox import Order
from runtime.sequence import Sampling


class OursGuessing:
    """An engine as `lab.speculating` makes it, over a target and the draft that lies beside it."""

    def __init__(self, folder: str, form: str, threads: int) -> None:
        torch.set_num_threads(threads)
        form, guess = guessing(form)
        target = Path(folder)
        bench = Bench(target, target.with_name("draft"), compiles=form == "compiled")
        self._engine = bench.engine(_way(guess))
        self.facts: dict[str, Any] = {}

    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        torch.set_num_threads(threads)
        engine = self._engine
        engine.forget_cached()
        sampling = Sampling(temperature=0.0, max_tokens=new, ignore_eos=True)
        keys = engine.submit([Order(prompt, sampling) for prompt in prompts])
        tokens: dict[int, list[int]] = {key: [] for key in keys}
        before, steps = self._counts(), engine.clock.steps
        engine.take_orders(wait=False)
        running = set(keys)
        while running:
            for output in engine.step():
                assert output.error is None, output.error
                tokens[output.key] += output.token_ids
                if output.finish_reason:
                    running.discard(output.key)
        told = {name: count - before[name] for name, count in self._counts().items()}
        facts = told | {"passes": float(engine.clock.steps - steps)}
        return Answers([tokens[key] for key in keys], facts)

    def _counts(self) -> dict[str, float]:
        if self._engine.speculation is None:
            return {}
        counts = self._engine.speculation.counts
        return {"drafts": counts.drafts, "drafted": counts.guessed, "accepted": counts.accepted}


def _way(guess: Guess | None) -> Way:
    if guess is None or guess.proposer == "none":
        return OFF
    asked = ("prediction", "ngram", "draft") if guess.proposer == "auto" else (guess.proposer,)
    return Way(guess.proposer, guess.proposer, guess.count, asked)


if __name__ == "__main__":
    serve(OursGuessing)
