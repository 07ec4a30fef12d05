"""The way of one call from replica to replica, until one answers or nothing is left to try.

Ends before the client gets a byte: what has begun to answer is not asked again. Knows which replica
may be tried and when; how a request is sent is the pool's, what answers mean is retries.py's.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from gateway import problems
from gateway.answer import Answer, Attempt, Cut
from gateway.call import Call
from gateway.replica import Replica
from gateway.retries import Budget, Meaning, retry_after_s
from policies.schema import Gateway
from runtime.wire import Problem

STALE_MAX = 3  # reset keep-alive connections that one request may meet
PAUSE_S = 0.05  # before the same replica is tried again, doubled each time, and up to half as long
REST_MAX_S = 30.0  # a replica that is busy is avoided no longer, whatever its Retry-After says
DEADLINE_HEADER = "x-slo-deadline-ms"


class Unreachable(Exception):
    """No connection to a replica could be made: nothing of the request was sent."""


class Stale(Exception):
    """A kept-alive connection turned out to be closed before any byte of an answer."""


class Failed(Exception):
    """The replica got the request, and no answer came of it."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One attempt, for the receipt."""

    url: str
    outcome: str
    after_s: float


@dataclass(slots=True)
class Attempts:
    """What has been tried for one call."""

    call: Call
    settings: Gateway
    budget: Budget
    rng: random.Random
    send: Callable[[Attempt, Call], Awaitable[Answer]]  # raises Unreachable, Stale, Failed
    choose: Callable[[Iterable[Replica], str], Replica | None]
    replicas: Callable[[], Iterable[Replica]]
    why_none: Callable[[str], Problem]
    passed: set[Replica] = field(default_factory=set)
    made: int = 0
    stale: int = 0
    tried: list[Tried] = field(default_factory=list)
    began: float = field(default_factory=lambda: asyncio.get_running_loop().time())

    async def answer(self) -> Answer:
        """The answer that goes to the client: a good one, or the last bad one. Raises Problem."""
        self.budget.request(self.began)
        failure: Answer | Problem | None = None
        while (replica := self._next()) is not None:
            attempt = Attempt(replica, asyncio.get_running_loop())
            try:
                answer = await self._try(attempt)
            except Stale as error:
                attempt.end(None)
                self.stale += 1
                if self.stale > STALE_MAX:
                    raise problems.upstream_failed(replica.url, str(error)) from None
                continue
            except Unreachable as error:
                attempt.end(False)
                self._note(attempt, "unreachable")
                replica.mark_down(str(error))
                self.passed.add(replica)
                continue
            except Failed as error:
                attempt.end(False)
                self._note(attempt, "failed")
                replica.doubt.set()
                failure = problems.upstream_failed(replica.url, str(error))
            else:
                self._note(attempt, str(answer.status))
                if answer.meaning is Meaning.ANSWER:
                    return answer
                failure = answer
            self.made += 1
            if not await self._again(replica, failure):
                break
        if failure is None:
            raise self.why_none(self.call.model)
        if isinstance(failure, Problem):
            raise failure
        return failure

    # ---- one attempt ----------------------------------------------------------------------------

    async def _try(self, attempt: Attempt) -> Answer:
        """Raises Unreachable, Stale, Failed, and Problem when the time of all attempts is up.

        Whatever else ends it gives the place back.
        """
        answer = None
        try:
            async with asyncio.timeout_at(self.began + self.settings.first_byte_timeout_s):
                answer = await self.send(attempt, self.call)
                await answer.look(stream=self.call.stream)
        except (Unreachable, Stale, Failed):
            raise
        except Cut as error:
            _give_up(answer, attempt, well=False)
            raise Failed(str(error)) from None
        except TimeoutError:
            _give_up(answer, attempt, well=False)
            attempt.replica.doubt.set()
            raise problems.upstream_timeout(self.settings.first_byte_timeout_s) from None
        except BaseException:
            _give_up(answer, attempt, well=None)
            raise
        attempt.answered()
        return answer

    # ---- what follows ---------------------------------------------------------------------------

    def _next(self) -> Replica | None:
        """Whom to ask now: someone who does not rest, else one who does."""
        now = asyncio.get_running_loop().time()
        may = [r for r in self.replicas() if r not in self.passed and r.takes(now)]
        awake = [replica for replica in may if replica.rests_until <= now]
        model = self.call.model
        return self.choose(awake, model) or self.choose(may, model)

    async def _again(self, replica: Replica, failure: Answer | Problem) -> bool:
        """Whether to try once more, after the wait that it takes; a bad answer is closed then."""
        wait_s = self._wait_s(replica, failure)
        if wait_s is None or self.made >= self.settings.retries.max_attempts:
            return False
        if not self.budget.take(asyncio.get_running_loop().time()):
            return False
        if isinstance(failure, Answer):
            failure.leave()
        if wait_s:
            self.passed.clear()
            await asyncio.sleep(wait_s)
        return True

    def _wait_s(self, replica: Replica, failure: Answer | Problem) -> float | None:
        """0 for another replica, else how long until this one may be asked again; None: never."""
        now = asyncio.get_running_loop().time()
        after_s = None
        if isinstance(failure, Answer):
            after_s = retry_after_s(failure.headers, time.time())
            if failure.meaning is Meaning.BUSY:
                replica.rests_until = now + min(after_s or 0.0, REST_MAX_S)
            else:
                replica.doubt.set()
        self.passed.add(replica)
        if self._next() is not None:
            return 0.0
        pause_s = PAUSE_S * 2 ** (self.made - 1) * (1 + self.rng.random() / 2)
        wait_s = pause_s if after_s is None else after_s
        too_long = wait_s > self.settings.retries.retry_after_max_s
        return None if too_long or now + wait_s >= self._deadline() else wait_s

    def _deadline(self) -> float:
        """When the client gives up, by its own words."""
        try:
            return self.began + float(self.call.headers[DEADLINE_HEADER]) / 1000
        except (KeyError, ValueError):  # none, or one that the replica will refuse
            return float("inf")

    def _note(self, attempt: Attempt, outcome: str) -> None:
        self.tried.append(Tried(attempt.replica.url, outcome, attempt.began - self.began))


def _give_up(answer: Answer | None, attempt: Attempt, *, well: bool | None) -> None:
    if answer is not None:
        answer.close(well=well)
    attempt.end(well)
