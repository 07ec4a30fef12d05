"""The four kinds of traffic by which routers are told apart, as prompts of named blocks.

A block is 16 tokens, and its number stands for all that came before it as well. Sessions go on when
they have got their answer; everything else comes when it comes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

BLOCK_TOKENS = 16
MODEL = "m"


@dataclass(slots=True)
class Request:
    """One prompt. `answer` are the blocks that the replica will add to it."""

    at: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    then: Callable[[float], Request | None] = field(default=lambda _now: None, repr=False)


class Names:
    """Blocks that nobody else has."""

    def __init__(self) -> None:
        self._next = count(1)

    def take(self, tokens: int) -> tuple[int, ...]:
        return tuple(next(self._next) for _ in range(-(-tokens // BLOCK_TOKENS)))


def agents(rng: random.Random, names: Names) -> Iterator[Request]:
    """32 sessions of 6 growing turns behind a system prompt of 1,024 tokens, 16 of them at once."""
    system = names.take(1024)
    waiting = list(range(32))

    def begin(now: float) -> Request | None:
        return turn(now, system, 6) if waiting and waiting.pop() >= 0 else None

    def turn(now: float, before: tuple[int, ...], left: int) -> Request:
        prompt = before + names.take(rng.randrange(300, 1500))
        answer = names.take(rng.randrange(50, 250))

        def then(later: float) -> Request | None:
            pause_s = rng.uniform(0.1, 1.0)
            if left == 1:
                return begin(later + pause_s)
            return turn(later + pause_s, prompt + answer, left - 1)

        return Request(now, prompt, answer, then)

    for _ in range(16):
        if (first := begin(rng.uniform(0, 1))) is not None:
            yield first


def hot(rng: random.Random, names: Names) -> Iterator[Request]:
    """300 requests, 15 a second; four in five begin with the same 3,072 tokens."""
    shared = names.take(3072)
    at = 0.0
    for _ in range(300):
        at += rng.expovariate(15)
        if rng.random() < 0.8:
            prompt = shared + names.take(rng.randrange(100, 700))
        else:
            prompt = names.take(rng.randrange(1000, 3000))
        yield Request(at, prompt, names.take(64))


def burst(rng: random.Random, names: Names) -> Iterator[Request]:
    """20 times 8 equal prompts of 2,048 tokens at once, one burst after another."""
    for number in range(20):
        prompt = names.take(2048)
        at = 1.5 * number + rng.random() / 10
        for _ in range(8):
            yield Request(at, prompt, names.take(32))


def tenants(rng: random.Random, names: Names) -> Iterator[Request]:
    """240 requests at almost all that the fleet can do: one of 64 system prompts of 1,536 tokens,
    and 4,608 of their own."""
    systems = [names.take(1536) for _ in range(64)]
    at = 0.0
    for _ in range(240):
        at += rng.expovariate(2.52)
        yield Request(at, rng.choice(systems) + names.take(4608), names.take(64))


WORKLOADS: dict[str, Callable[[random.Random, Names], Iterator[Request]]] = {
    "agents": agents, "hot": hot, "burst": burst, "tenants": tenants,
}  # fmt: skip
