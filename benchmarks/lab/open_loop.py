"""Requests that come when they come, whatever the engine is doing, and when their tokens left.

Time is the CPU time of the one computing thread, and waiting for the next arrival costs none: other
work on the machine does not disturb it, and a quiet hour passes at once. Imports the engine, and so
torch, so that only those who measure it import this module, and late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from time import thread_time

from runtime.engine import Engine
from runtime.inbox import Order
from runtime.sequence import Sampling, Service


class ComputeClock:
    """Seconds that this thread has computed, plus those that were skipped."""

    def __init__(self) -> None:
        self._skipped_s = -thread_time()

    def __call__(self) -> float:
        return thread_time() + self._skipped_s

    def skip_to(self, moment_s: float) -> None:
        self._skipped_s += max(0.0, moment_s - self())


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of `kind` that comes at `at_s`."""

    at_s: float
    kind: str
    prompt: list[int]
    new: int
    service: Service


@dataclass(slots=True)
class Served:
    """A request and the moments at which its tokens left."""

    arrival: Arrival
    token_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.arrival.at_s

    @property
    def gaps_s(self) -> list[float]:
        pairs = zip(self.token_s, self.token_s[1:], strict=False)
        return [later - earlier for earlier, later in pairs]

    @property
    def tpot_s(self) -> float:
        return (self.token_s[-1] - self.token_s[0]) / max(1, len(self.token_s) - 1)


def serve_arrivals(engine: Engine, clock: ComputeClock, arrivals: Many[Arrival]) -> list[Served]:
    """Every request to its end, in the order of arrival. `engine` runs on `clock`."""
    coming = deque(sorted(arrivals, key=lambda one: one.at_s))
    served: list[Served] = []
    running: dict[int, Served] = {}
    while coming or running:
        if not running:
            clock.skip_to(coming[0].at_s)
        while coming and coming[0].at_s <= clock():
            one = Served(coming.popleft())
            served.append(one)
            running[engine.submit([_order(one.arrival)])[0]] = one
        engine.take_orders(wait=False)
        for output in engine.step():
            assert output.error is None, output.error
            running[output.key].token_s += [clock()] * len(output.token_ids)
            if output.finish_reason:
                del running[output.key]
    return served


def _order(arrival: Arrival) -> Order:
    sampling = Sampling(temperature=0.0, max_tokens=arrival.new, ignore_eos=True)
    return Order(arrival.prompt, sampling, arrival.service)
