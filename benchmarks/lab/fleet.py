"""Simulated replicas on a clock of their own, and the gateway's own routing before them.

A replica prefills one prompt after another at a fixed rate, chunk by chunk beside its running
answers, keeps blocks in an LRU, and says in its usage what it found there.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from benchmarks.lab.workloads import BLOCK_TOKENS, MODEL, Request
from cache.prefix_index import Mode, PrefixIndex
from gateway.call import CHAT_PATH, Call
from gateway.ladder import Ladder
from gateway.prompt import Prompt
from gateway.replica import Replica
from gateway.routing import Routing
from gateway.usage import Usage
from policies.routing import Routing as Policy

CHUNK_TOKENS = 512
ANSWER_S = 0.0005  # that a running answer adds to a chunk
TOKEN_S = 0.02  # between an answer's tokens


@dataclass(slots=True)
class Cache:
    """Blocks of one replica, the longest unused ones given up first."""

    capacity_blocks: int
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def found(self, prompt: Sequence[int]) -> int:
        """Leading blocks that are there; they count as used now."""
        held = 0
        for one in prompt:
            if one not in self.blocks:
                break
            self.blocks.move_to_end(one)
            held += 1
        return min(held, len(prompt) - 1)

    def keep(self, blocks: Iterable[int]) -> None:
        for one in blocks:
            self.blocks[one] = None
            self.blocks.move_to_end(one)
        while len(self.blocks) > self.capacity_blocks:
            self.blocks.popitem(last=False)


def prefill_s(tokens: int, answers: int, rate: float) -> float:
    """Seconds to compute so much beside so many answers."""
    return tokens / rate + -(-tokens // CHUNK_TOKENS) * answers * ANSWER_S


class Router(Protocol):
    """A way of choosing. `first` and `over` say what became of a choice."""

    def choose(self, request: Request) -> int: ...
    def first(self, request: Request) -> None: ...
    def over(self, request: Request, cached_tokens: int, /) -> None: ...


class Plain:
    """The ways that need to know little: in turn, by load, by the longest prefix sent before."""

    def __init__(self, way: str, count: int, rng: random.Random) -> None:
        self._way = way
        self._rng = rng
        self._loads = [0] * count
        self._sent: list[set[int]] = [set() for _ in range(count)]
        self._turn = -1
        self._chosen: dict[int, int] = {}

    def choose(self, request: Request) -> int:
        at = self._choose(request)
        self._loads[at] += 1
        self._sent[at].update(request.prompt)
        self._chosen[id(request)] = at
        return at

    def _choose(self, request: Request) -> int:
        if self._way == "round_robin":
            self._turn = (self._turn + 1) % len(self._loads)
            return self._turn
        ranks = [(0, load) for load in self._loads]
        if self._way == "longest_prefix":
            ranks = [
                (-_held(sent, request.prompt), load)
                for sent, load in zip(self._sent, self._loads, strict=True)
            ]
        best = min(ranks)
        return self._rng.choice([at for at, rank in enumerate(ranks) if rank == best])

    def first(self, request: Request) -> None:
        pass

    def over(self, request: Request, _cached_tokens: int, /) -> None:
        self._loads[self._chosen.pop(id(request))] -= 1


def _held(sent: set[int], prompt: Sequence[int]) -> int:
    held = 0
    for one in prompt:
        if one not in sent:
            break
        held += 1
    return held


class Ours:
    """The gateway's routing, whole, on a simulated clock. With `tells`, replicas tell of every
    block, as by KV-cache events; without, what they hold is guessed by what was sent."""

    def __init__(
        self,
        count: int,
        clock: Callable[[], float],
        rng: random.Random,
        tier: str,
        *,
        tells: bool = False,
        **policy: Any,
    ) -> None:
        self.index = PrefixIndex()
        self.ladder = Ladder()
        self.routing = Routing(Policy(**policy), self.index, self.ladder, clock=clock, rng=rng)
        self.tells = tells
        self.replicas = [
            Replica(f"http://r{at}", models={MODEL: {}}, healthy=True) for at in range(count)
        ]
        if tells:
            for replica in self.replicas:
                self.index.trust(replica.url, Mode.EXACT)
        self._tier = tier
        self._under_way: dict[int, tuple[Any, Replica, Any]] = {}

    def choose(self, request: Request) -> int:
        hashes = hashes_of(request.prompt)
        prompt = Prompt(BLOCK_TOKENS * len(hashes), hashes, exact=True)
        trip = self.routing.trip(Call(CHAT_PATH, MODEL, True, b""), prompt, self._tier, "t")
        chosen = trip.choose(self.replicas, MODEL)
        assert chosen is not None, "all are healthy"
        self._under_way[id(request)] = (trip, chosen, trip.book(chosen))
        chosen.in_flight += 1
        return self.replicas.index(chosen)

    def first(self, request: Request) -> None:
        self._under_way[id(request)][2].first_token()

    def over(self, request: Request, cached_tokens: int) -> None:
        trip, chosen, booking = self._under_way.pop(id(request))
        tokens = BLOCK_TOKENS * len(request.prompt)
        trip.served(booking, Usage(tokens, BLOCK_TOKENS * len(request.answer), cached_tokens))
        booking.end()
        chosen.in_flight -= 1
        if self.tells:
            self.index.stored(chosen.url, hashes_of(request.prompt + request.answer))


def hashes_of(prompt: Sequence[int]) -> tuple[bytes, ...]:
    return tuple(one.to_bytes(8, "little") for one in prompt)


@dataclass(slots=True)
class Outcome:
    """What became of a workload."""

    ttft_s: list[float] = field(default_factory=list)
    prompt_blocks: int = 0
    found_blocks: int = 0
    computed_tokens: list[int] = field(default_factory=list)  # by replica
    requests: list[int] = field(default_factory=list)

    @property
    def hit_share(self) -> float:
        return self.found_blocks / max(1, self.prompt_blocks)

    @property
    def busiest_over_mean(self) -> float:
        computed = self.computed_tokens
        return max(computed) * len(computed) / max(1, sum(computed))


class Fleet:
    """Replicas, a router, and a clock that jumps from event to event."""

    def __init__(self, count: int, rate: float, capacity_blocks: int, tokens_a_block: int) -> None:
        self.now = 0.0
        self.outcome = Outcome(computed_tokens=[0] * count, requests=[0] * count)
        self._rate = rate
        self._tokens = tokens_a_block
        self._caches = [Cache(capacity_blocks) for _ in range(count)]
        self._queues: list[deque[Request]] = [deque() for _ in range(count)]
        self._answers = [0] * count
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def run(self, requests: Iterable[Request], router: Router) -> Outcome:
        for request in requests:
            self._at(request.at, partial(self._arrive, request, router))
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self.outcome

    def _at(self, when: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def _arrive(self, request: Request, router: Router) -> None:
        chosen = router.choose(request)
        self.outcome.requests[chosen] += 1
        queue = self._queues[chosen]
        queue.append(request)
        if len(queue) == 1:
            self._begin(chosen, router)

    def _begin(self, at: int, router: Router) -> None:
        request = self._queues[at][0]
        held = self._caches[at].found(request.prompt)
        tokens = (len(request.prompt) - held) * self._tokens
        self.outcome.prompt_blocks += len(request.prompt)
        self.outcome.found_blocks += held
        self.outcome.computed_tokens[at] += tokens
        took_s = prefill_s(tokens, self._answers[at], self._rate)
        self._at(self.now + took_s, lambda: self._first(at, request, held, router))

    def _first(self, at: int, request: Request, held: int, router: Router) -> None:
        self._queues[at].popleft()
        self._caches[at].keep(request.prompt)
        self.outcome.ttft_s.append(self.now - request.at)
        self._answers[at] += 1
        router.first(request)
        if self._queues[at]:
            self._begin(at, router)
        took_s = TOKEN_S * len(request.answer) * BLOCK_TOKENS
        self._at(self.now + took_s, lambda: self._end(at, request, held, router))

    def _end(self, at: int, request: Request, held: int, router: Router) -> None:
        self._answers[at] -= 1
        self._caches[at].keep(request.prompt + request.answer)
        router.over(request, held * BLOCK_TOKENS)
        following = request.then(self.now)
        if following is not None:
            self._at(following.at, partial(self._arrive, following, router))
