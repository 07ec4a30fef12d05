"""Who says the rest of an answer whose replica failed: another replica first, the best way first.

Knows replicas and what they can; how two streams become one is splice.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from gateway import problems
from gateway.answer import Answer
from gateway.attempts import Attempts
from gateway.call import Call
from gateway.journal import Journal
from gateway.replica import Replica
from gateway.retries import Budget, Meaning
from gateway.splice import Way, continuation, ways
from runtime.wire import Problem


@dataclass(frozen=True, slots=True)
class Rest:
    """What a pool has for it. An answer that is gone on with costs one attempt of the budget."""

    replicas: Callable[[], Sequence[Replica]]
    attempts: Callable[[Call, Callable[[], Iterable[Replica]]], Attempts]
    budget: Budget
    asked_at: float  # when the request came: its deadline counts from there

    async def open(
        self, call: Call, journal: Journal, failed: Sequence[Replica]
    ) -> tuple[Answer, Way]:
        """The rest, by one of those that have not failed if any can, and how: before others those
        that are made of the same as whoever has begun. Raises Problem."""
        replicas = self.replicas()
        nobody = problems.no_replica(call.model, [replica.state() for replica in replicas])
        if not self.budget.take(asyncio.get_running_loop().time()):
            raise nobody
        others = [replica for replica in replicas if replica not in failed]
        alike = [one for one in others if one.fingerprint == journal.fingerprint]
        unlike = [one for one in others if one not in alike]
        for group in (alike, unlike, failed):
            for way in Way:
                able = [one for one in group if way in ways(one.kind, call, journal)]
                if way is Way.TEXT:
                    able = [one for one in able if one.continues]
                if able and (answer := await self._ask(call, journal, way, able)) is not None:
                    return answer, way
        raise nobody

    async def _ask(
        self, call: Call, journal: Journal, way: Way, able: list[Replica]
    ) -> Answer | None:
        """The answer of the first that takes the request in this way; None where nobody does."""
        rest = replace(call, body=continuation(call, journal, way))
        while able:
            try:
                attempts = self.attempts(rest, able.copy)
                attempts.asked_at = self.asked_at
                answer = await attempts.answer()
            except Problem:
                return None
            if answer.status == 200 and answer.meaning is Meaning.ANSWER:
                return answer
            answer.close(well=answer.well)
            able.remove(refused := answer.attempt.replica)
            if way is Way.TEXT and answer.meaning is Meaning.ANSWER:
                refused.continues = False  # its template takes no open turn
        return None
