"""The same load through several engines in turns, and what is told of it.

Rounds are interleaved, and ratios are taken within a round, so that what else the machine does
hits all alike. Tokens a CPU-second stay comparable on a busy machine, tokens a second do not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.lab.engines import EngineFailed, Ran, Running

_SEED = 0
_FIRST_ID = 259  # below it are special tokens and single bytes
_LAST_ID = 8191


@dataclass(frozen=True, slots=True)
class Load:
    """`count` prompts at once, the first `shared` tokens of each the same; `new` tokens for each.

    With `decode_only`, the same prompts are also answered with one token, and the difference is
    what counts.
    """

    name: str
    count: int
    prompt: int
    new: int
    shared: int = 0
    decode_only: bool = False

    def prompts(self, round_: int, threads: int) -> list[list[int]]:
        """Other ones every round and for each number of threads, so that no engine's prefix cache
        knows them from before."""
        rng = random.Random(f"{self.name} {threads} {round_} {_SEED}")

        def draw(count: int) -> list[int]:
            return [rng.randint(_FIRST_ID, _LAST_ID) for _ in range(count)]

        shared = draw(self.shared)
        return [shared + draw(self.prompt - self.shared) for _ in range(self.count)]

    @property
    def ideal_prefill(self) -> int:
        """Prompt tokens to compute when the shared ones are computed once."""
        return self.shared + self.count * (self.prompt - self.shared)


@dataclass(frozen=True, slots=True)
class Trial:
    """One load with one number of threads, through the named engines."""

    load: Load
    threads: int
    rounds: int
    engines: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.load.name}, {self.threads} thread{'s' if self.threads > 1 else ''}"


Rounds = dict[str, list[Ran]]  # by engine; all lists as long as each other


def compare(
    trial: Trial,
    running: Mapping[str, Running],
    failed: dict[str, str],
    progress: Callable[[str], None],
) -> Rounds:
    """Every round through every engine, after one that is not counted and shorter.

    An engine that fails is left out from then on, and `failed` says why.
    """
    load = trial.load
    rounds: Rounds = {name: [] for name in trial.engines if name in running and name not in failed}
    for round_ in range(-1, trial.rounds):
        prompts = load.prompts(round_, trial.threads)
        for name in _turns(list(rounds), round_):
            try:
                if round_ < 0:
                    running[name].run(prompts[:1], 2, trial.threads)
                else:
                    rounds[name].append(_one(running[name], load, prompts, trial.threads))
            except EngineFailed as error:
                failed[name] = str(error)
                del rounds[name]
        if round_ >= 0:
            last = (f"{name} {_tok_cpu_s(runs[-1]):.3g}" for name, runs in rounds.items())
            progress(f"{trial.name}: round {round_ + 1}, tokens a CPU-second: {', '.join(last)}")
    return rounds


def _turns(names: list[str], round_: int) -> list[str]:
    """Who goes first changes from round to round."""
    at = round_ % max(1, len(names))
    return names[at:] + names[:at]


def _one(engine: Running, load: Load, prompts: list[list[int]], threads: int) -> Ran:
    whole = engine.run(prompts, load.new + load.decode_only, threads)
    if not load.decode_only:
        return whole
    first = engine.run(prompts, 1, threads)
    tokens = [answer[1:] for answer in whole.tokens]
    return Ran(whole.wall_s - first.wall_s, whole.cpu_s - first.cpu_s, tokens, whole.facts)


# ---- what is told --------------------------------------------------------------------------------


def tell(rounds: Rounds, oracle: list[Ran]) -> dict[str, Any]:
    """Medians by engine; the share of answers' tokens before the first that differs from the
    oracle's, over the rounds that it answered."""
    return {
        name: {
            "tok_s": median(ran.answered / ran.wall_s for ran in runs),
            "tok_cpu_s": median(_tok_cpu_s(ran) for ran in runs),
        }
        | ({"equal": _equal_share(runs, oracle)} if oracle else {})
        for name, runs in rounds.items()
        if runs
    }


def ratio(rounds: Rounds, ours: str, peer: str) -> float | None:
    """Tokens a CPU-second of ours over the peer's, the median over rounds; None without both."""
    if not rounds.get(ours) or not rounds.get(peer):
        return None
    pairs = zip(rounds[ours], rounds[peer], strict=True)
    return median(_tok_cpu_s(one) / _tok_cpu_s(other) for one, other in pairs)


def _tok_cpu_s(ran: Ran) -> float:
    return ran.answered / ran.cpu_s


def _equal_share(runs: list[Ran], oracles: list[Ran]) -> float:
    """Behind the first different token two answers have different contexts and do not compare."""
    equal = whole = 0
    for ran, oracle in zip(runs, oracles, strict=False):
        for answer, expected in zip(ran.tokens, oracle.tokens, strict=True):
            whole += len(expected)
            differ = (
                at for at, pair in enumerate(zip(answer, expected, strict=True)) if len({*pair}) > 1
            )
            equal += next(differ, len(expected))
    return equal / whole
