"""The way of one call from replica to replica, until one answers or nothing is left to try.

Ends before the client gets a byte: what has begun to answer is not asked again. Knows which replica
may be tried and when; how a request is sent is the pool's, what answers mean is retries.py's.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from gateway import problems
from gateway.answer import Answer, Attempt
from gateway.call import Call
from gateway.client import Unreachable
from gateway.exchange import Late, Send, exchange
from gateway.hedge import due_s, race, spare
from gateway.receipt import Tried
from gateway.replica import Replica
from gateway.response import Failed, Stale
from gateway.retries import Budget, Meaning, retry_after_s
from gateway.route import eligible
from gateway.routing import Trip
from policies.schema import Gateway
from runtime.wire import Problem

STALE_MAX = 3  # reset keep-alive connections that one request may meet
PAUSE_S = 0.05  # before a replica is asked again, doubled each time; with up to half as much more
SOON_S = 0.05  # after it came, a request's deadline is still what it says
REST_MAX_S = 30.0  # a replica that is busy is avoided no longer, whatever its Retry-After says
DEADLINE_HEADER = "x-slo-deadline-ms"
TTFT_HEADER = "x-slo-ttft-ms"


@dataclass(slots=True)
class Attempts:
    """What has been tried for one call."""

    call: Call
    settings: Gateway
    budget: Budget  # of attempts behind the first
    duplicates: Budget  # of bytes of prompts that are sent twice at once
    rng: random.Random
    send: Send
    trip: Trip  # chooses among replicas
    replicas: Callable[[], Iterable[Replica]]
    why_none: Callable[[str], Problem]
    passed: set[Replica] = field(default_factory=set)
    made: int = 0
    stale: int = 0
    tried: list[Tried] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    began: float = field(init=False)
    asked_at: float | None = None  # where the request is older than these attempts

    def __post_init__(self) -> None:
        self.began = self.loop.time()

    async def answer(self) -> Answer:
        """The answer that goes to the client: a good one, or the last bad one. Raises Problem."""
        failure: Answer | Problem | None = None
        while (replica := self._next()) is not None:
            try:
                answer = await self._try(replica)
            except Stale as error:
                self.stale += 1
                if self.stale > STALE_MAX:
                    raise problems.upstream_failed(replica.url, str(error)) from None
                continue
            except Unreachable:
                self.passed.add(replica)
                continue
            except Failed as error:
                failure = problems.upstream_failed(replica.url, str(error))
            else:
                if answer.meaning is Meaning.ANSWER:
                    return answer
                failure = answer
            if not await self._again(replica, failure):
                break
        if failure is None:
            raise self.why_none(self.call.model)
        if isinstance(failure, Problem):
            raise failure
        return failure

    # ---- one attempt, or two at once ------------------------------------------------------------

    async def _try(self, replica: Replica) -> Answer:
        """Raises Unreachable, Stale, Failed, and Problem when the time of all attempts is up."""
        policy = self.settings.hedge
        if policy is None or not self.call.stream:
            return await self._once(replica)
        target_s = self._header_s(TTFT_HEADER) or policy.ttft_s
        predicted_s = self.trip.foreseen_s(replica)
        return await race(
            self._once(replica),
            lambda: self._second(replica),
            due_s(policy, target_s, replica.ttft_s if predicted_s is None else predicted_s),
            lambda answer: answer.meaning is Meaning.ANSWER,
            Answer.leave,
        )

    def _second(self, first: Replica) -> Coroutine[Any, Any, Answer] | None:
        """The same request to another replica that has capacity to spare, within the budget."""
        other = self._next(besides=first)
        if other is None or not spare(other.in_flight, first.in_flight):
            return None
        if not self.duplicates.take(self.loop.time(), len(self.call.body)):
            return None
        self.passed.add(other)
        return self._once(other)

    async def _once(self, replica: Replica) -> Answer:
        """One request to one replica, whose place there is given back unless an answer comes."""
        booking = self.trip.book(replica)
        attempt = Attempt(replica, self.loop, booking, self.trip.hop(replica))
        self.made += 1
        outcome, well = "left", None
        try:
            answer = await exchange(
                self.send, attempt, self._in_time(attempt.began), self.settings,
                self.began + self.settings.first_byte_timeout_s,
                lambda: self._may_leave(replica),
            )  # fmt: skip
            outcome = str(answer.status)
            # A refusal came without the work, and says nothing of how long that takes.
            first = self.call.stream and not answer.refused
            attempt.answered(answer.told, answer.head, first=first)
            if not answer.refused:
                attempt.booking.first_token()
            return answer
        except Unreachable as error:
            outcome, well = "unreachable", False
            self.made -= 1  # nothing was sent
            replica.mark_down(str(error))
            raise
        except Stale:
            outcome = "stale"
            self.made -= 1
            raise
        except Late:
            outcome = "late"  # which a long prompt is, too
            raise
        except Failed:
            outcome, well = "failed", False
            raise
        except Problem:
            outcome, well = "timeout", False
            raise
        finally:
            self.tried.append(Tried(replica.url, outcome, attempt.began - self.began))
            if attempt.hop is not None:
                attempt.hop.outcome = outcome
            if not outcome.isdigit():
                attempt.end(well)
                if outcome not in ("left", "unreachable"):
                    replica.doubt.set()

    def _may_leave(self, replica: Replica) -> bool:
        """Whether another attempt may follow one that is late, also at one that failed before."""
        now = self.loop.time()
        if self.made >= self.settings.retries.max_attempts or not self.budget.allows(now):
            return False
        others = (
            other
            for other in self.replicas()
            if other is not replica and other.takes(now) and other.rests_until <= now
        )
        return bool(eligible(others, self.call.model))

    # ---- what follows ---------------------------------------------------------------------------

    def _next(self, *, besides: Replica | None = None) -> Replica | None:
        """Whom to ask now: someone who does not rest, else one who does."""
        now = self.loop.time()
        may = [
            replica
            for replica in self.replicas()
            if replica not in self.passed and replica is not besides and replica.takes(now)
        ]
        rested = [replica for replica in may if replica.rests_until <= now]
        model = self.call.model
        chosen = self.trip.choose(rested, model)
        if chosen is not None or len(rested) == len(may):
            return chosen
        return self.trip.choose(may, model)

    async def _again(self, replica: Replica, failure: Answer | Problem) -> bool:
        """Whether to try once more, after the wait that it takes; a bad answer is closed then."""
        now = self.loop.time()
        after_s = self._note_failure(replica, failure, now)
        self.passed.add(replica)
        wait_s = 0.0 if self._next() is not None else self._pause_s(after_s)
        in_time = wait_s <= self.settings.retries.retry_after_max_s
        if not in_time or (wait_s and now + wait_s >= self._deadline()):
            return False
        if self.made >= self.settings.retries.max_attempts or not self.budget.take(now):
            return False
        if isinstance(failure, Answer):
            failure.leave()
        if wait_s:
            self.passed.clear()
            if self._next(besides=replica) is not None:
                self.passed.add(replica)
            await asyncio.sleep(wait_s)
        return True

    def _note_failure(
        self, replica: Replica, failure: Answer | Problem, now: float
    ) -> float | None:
        """Seconds after which the replica wants to be asked again, if it says so. It rests as long,
        unless it is the client's own key that is asked to wait."""
        if isinstance(failure, Problem):
            return None
        after_s = retry_after_s(failure.headers, time.time())
        if failure.meaning is Meaning.BROKEN:
            replica.doubt.set()
        elif failure.status == 503 or replica.own or replica.api_key or not self.call.authorization:
            replica.rests_until = now + min(after_s or 0.0, REST_MAX_S)
        return after_s

    def _pause_s(self, after_s: float | None) -> float:
        """How long to wait until a replica is asked a second time."""
        pause_s: float = PAUSE_S * 2 ** (self.made - 1) * (1 + self.rng.random() / 2)
        return max(pause_s, after_s or 0.0)

    def _deadline(self) -> float:
        """When the client gives up, by its own words."""
        deadline_s = self._header_s(DEADLINE_HEADER)
        asked_at = self.began if self.asked_at is None else self.asked_at
        return math.inf if deadline_s is None else asked_at + deadline_s

    def _in_time(self, now: float) -> Call:
        """The call with what is left of its deadline: a replica counts from when it hears of it."""
        deadline = self._deadline()
        if deadline == math.inf or (self.asked_at is None and now - self.began < SOON_S):
            return self.call
        left_ms = max(1.0, 1000 * (deadline - now))
        headers = self.call.headers | {DEADLINE_HEADER: f"{left_ms:.0f}"}
        return replace(self.call, headers=headers)

    def _header_s(self, name: str) -> float | None:
        """A header's milliseconds; None without one, or for one that the replica will refuse."""
        text = self.call.headers.get(name)
        if text is None:
            return None
        try:
            return float(text) / 1000
        except ValueError:
            return None
