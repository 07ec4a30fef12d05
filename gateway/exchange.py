"""One request to one replica: sent, and waited for until its answer shows what it is worth.

Knows how long to wait and what ends the wait; knows neither other replicas nor the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from gateway import problems
from gateway.answer import Answer, Attempt
from gateway.call import Call
from gateway.deadline import Deadline
from gateway.response import Cut, Failed
from policies.schema import Gateway

AGAIN_S = 0.25  # until a late attempt looks again for somebody else to ask


class Late(Failed):
    """Its first token takes longer than is waited while another replica could be asked."""


Send = Callable[[Attempt, Call], Awaitable[Answer]]  # raises Unreachable, Stale, Failed


async def exchange(
    send: Send, attempt: Attempt, call: Call, settings: Gateway, until: float, may_leave: MayLeave
) -> Answer:
    """The answer as far as its first event, or its headers where it is no stream.

    Raises Unreachable, Stale, Failed, Late, and Problem 504 at `until`. Whatever it raises, the
    connection is closed then.
    """
    policy = settings.retries
    answer: Answer | None = None
    complete = False
    patience: Patience | None = None
    try:
        with Deadline(until) as limit:
            if call.stream:  # the headers of a whole answer come when it is complete
                patience = Patience(limit, may_leave)
                patience.wait(attempt.began, policy.headers_failover_s, policy.ttft_failover_s)
            answer = await send(attempt, call)
            if patience is not None:
                patience.wait(attempt.began, policy.ttft_failover_s)
            await answer.look(stream=call.stream)
        complete = True
        return answer
    except Cut as error:
        raise Failed(str(error)) from None
    except TimeoutError:
        if patience is not None and patience.left_after_s is not None:
            raise Late(f"no first token within {patience.left_after_s:g} s") from None
        raise problems.upstream_timeout(settings.first_byte_timeout_s) from None
    finally:
        if patience is not None:
            patience.stop()
        if answer is not None and not complete:
            answer.drop()


MayLeave = Callable[[], bool]


@dataclass(slots=True)
class Patience:
    """Ends the wait within `limit` once it has been too long and `may_leave` agrees."""

    limit: Deadline
    may_leave: MayLeave
    left_after_s: float | None = None
    _timer: asyncio.TimerHandle | None = field(default=None, repr=False)

    def wait(self, began: float, *limits_s: float | None) -> None:
        """From now on the shortest of these counts, from `began` on; None: for ever."""
        self.stop()
        after_s = min((limit_s for limit_s in limits_s if limit_s is not None), default=None)
        if after_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(began + after_s, self._look, after_s)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, after_s: float) -> None:
        loop = asyncio.get_running_loop()
        if self.may_leave():
            self.left_after_s = after_s
            self.limit.now()
        else:
            self._timer = loop.call_later(AGAIN_S, self._look, after_s)
