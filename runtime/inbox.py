"""What comes to the engine from other threads: orders, cancellations, the word to stop.

Knows a lock and queues; knows neither scheduler nor model.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.sequence import Sampling, Sequence, Service

if TYPE_CHECKING:
    from runtime.tracing import Track


class QueueFull(Exception):
    """As many sequences wait as the policy allows; nothing was taken. `retry_s`: when to retry."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests wait already")
        self.waiting = waiting
        self.retry_s = 1.0


class EngineStopped(Exception):
    """The engine takes no more orders."""


@dataclass(frozen=True, slots=True)
class Order:
    """A prompt to continue; several of one request are submitted together.

    Only prompts with the same `salt` and `adapter` share cached blocks.
    """

    prompt: Many[int]
    sampling: Sampling
    service: Service = Service()
    salt: str | None = None
    adapter: str | None = None
    prediction: Many[int] = ()  # what the client expects the answer to be
    begun: Many[int] = ()  # what of the answer has been said elsewhere
    track: Track | None = None  # what becomes of it is noted there


@dataclass(frozen=True, slots=True)
class News:
    """What came in since the last step. `going_on` is false once the engine is to stop."""

    orders: list[Sequence]
    cancels: list[int]
    clear: bool
    going_on: bool


@dataclass(slots=True)
class Inbox:
    """Orders and cancellations on their way to the engine's thread."""

    ready: threading.Condition = field(default_factory=threading.Condition)
    orders: deque[Sequence] = field(default_factory=deque)
    cancels: deque[int] = field(default_factory=deque)
    clear: bool = False
    open: bool = True
    _next_key: int = 0

    def put(self, sequences: Many[Sequence], *, behind: int, most: int) -> None:
        """Takes all of them, with a new key each, or none: behind so many others, `most` may wait.

        Raises QueueFull and EngineStopped.
        """
        with self.ready:
            if not self.open:
                raise EngineStopped("the engine is stopping")
            waiting = len(self.orders) + behind
            if waiting and waiting + len(sequences) > most:
                raise QueueFull(waiting)
            for sequence in sequences:
                sequence.key = self._next_key
                self._next_key += 1
            self.orders += sequences
            self.ready.notify()

    def cancel(self, keys: Many[int]) -> None:
        with self.ready:
            self.cancels.extend(keys)
            self.ready.notify()

    def forget_cached(self) -> None:
        with self.ready:
            self.clear = True
            self.ready.notify()

    def close(self) -> None:
        with self.ready:
            self.open = False
            self.ready.notify()

    def wake(self) -> None:
        """Ends a wait: somebody who waited can go on."""
        with self.ready:
            self.ready.notify()

    def take(self, *, wait: bool) -> News:
        """Everything that came in; with `wait`, not before something has, or the end."""
        with self.ready:
            while wait and self.open and not (self.orders or self.cancels or self.clear):
                self.ready.wait()
            news = News(list(self.orders), list(self.cancels), self.clear, self.open)
            self.orders.clear()
            self.cancels.clear()
            self.clear = False
        return news

    def rest(self, seconds: float) -> None:
        """Gives way until something comes in, or is ready elsewhere, or the time is over."""
        with self.ready:
            if self.open and not (self.orders or self.cancels):
                self.ready.wait(seconds)
