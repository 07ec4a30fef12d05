"""A replica's answer on its way to the client: bytes as they come, a cut never taken for an end."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable
from contextlib import suppress

from gateway import problems
from gateway.reply import Headers, Reply
from gateway.response import Cut
from gateway.resume import Opened
from policies.schema import Gateway
from runtime.wire import Problem, parse_object

WHOLE_MAX_BYTES = 64 * 2**20
LATE_ERROR_MAX_BYTES = 2**16
LINGER_S = 0.5  # a replica may take this long to end its stream after [DONE]

# Framing is ours, the date and server name are uvicorn's, the request's id is the client's. What a
# worker tells of its time stands in the gateway's own Server-Timing.
OWN_HEADERS = frozenset(
    (
        b"connection", b"content-length", b"date", b"keep-alive", b"proxy-authenticate",
        b"proxy-connection", b"server", b"server-timing", b"set-cookie", b"te", b"trailer",
        b"transfer-encoding", b"upgrade", b"x-headgate-tier", b"x-request-id",
    )
)  # fmt: skip
# uvicorn refuses a whole answer for one of these in a header's value.
FORBIDDEN = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Silence:
    """How long the replica has said nothing to a waiting client, and what follows from it.

    `since` is None while the client is written to: a slow reader is not the replica's silence.
    Moments are exact: a loop's own clock may stand still for its turn, and go by the millisecond.
    """

    def __init__(self, settings: Gateway, reply: Reply, *, stream: bool) -> None:
        self.since: float | None = time.monotonic()
        self._settings = settings
        self._rest_s = min(settings.keep_alive_s, settings.idle_timeout_s)
        self._reply = reply
        self._stream = stream
        self._interrupt: Callable[[Problem], None] | None = None
        self._commented = self.since
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    def answering(self, interrupt: Callable[[Problem], None]) -> None:
        """An answer has begun: from here on its silence is limited, and ended by `interrupt`."""
        self._interrupt = interrupt
        self.since = time.monotonic()

    def over(self) -> None:
        """The replica has said everything, whatever the client still waits for."""
        self._interrupt = None
        self.since = None

    def client_left(self) -> None:
        """Whatever the replica still says is said in vain."""
        self._reply.pulse.left()

    def watch(self) -> None:
        """Looks when it is due, until `end`: as it has just begun, not before `_rest_s`."""
        self._look_in(self._rest_s)

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._begin_look)

    def end(self) -> None:
        for one in (self._timer, self._looking):
            if one is not None:
                one.cancel()

    def _begin_look(self) -> None:
        self._looking = asyncio.create_task(self._look_and_watch())

    async def _look_and_watch(self) -> None:
        await self.look()
        self._look_in(self.due_s())

    def due_s(self) -> float:
        """When to look next, in seconds from now.

        Soon enough for a silence that begins, or a limit that changes, while nobody looks.
        """
        rest_s = self._rest_s
        if self.since is None:
            return rest_s
        due = self.since + self._settings.idle_timeout_s if self._interrupt else math.inf
        if self._stream:
            due = min(due, self._comment_at(self.since))
        return min(max(due - time.monotonic(), 0.0), rest_s)

    async def look(self) -> None:
        """Comments when it is time to; interrupts the answer when the replica's time is up."""
        now = time.monotonic()
        if self.since is None:
            return
        if self._interrupt is not None and now - self.since >= self._settings.idle_timeout_s:
            self.since = now  # whoever goes on with the answer has its own time
            self._interrupt(problems.idle_timeout(self._settings.idle_timeout_s))
            return
        if self._stream and now >= self._comment_at(self.since):
            self._commented = now
            await self._reply.comment()

    def _comment_at(self, since: float) -> float:
        return max(since, self._commented) + self._settings.keep_alive_s


async def relay(answer: Opened, reply: Reply, silence: Silence, *, stream: bool) -> None:
    """The whole of `answer`, as the stream or the body that it is. Raises Problem."""
    if stream and answer.status == 200 and answer.is_stream:
        await relay_stream(answer, reply, silence)
    elif reply.started:
        await relay_late(answer, reply, silence)
    else:
        body = await read_whole(answer, silence, WHOLE_MAX_BYTES)
        await reply.whole(answer.status, passed_headers(answer), body)


async def relay_stream(answer: Opened, reply: Reply, silence: Silence) -> None:
    """Chunks as they come, until the replica ends. Raises Problem when it ends without [DONE]."""
    if answer.encoding != "identity":
        raise problems.answer_encoded(answer.encoding)
    await reply.begin_stream(passed_headers(answer))
    passage = Passage(answer, reply, silence)
    reason = "it ended without [DONE]"
    try:
        await answer.flow(passage.pass_on)
    except Cut as error:
        reason = str(error)
    if not reply.terminated:
        raise problems.stream_cut(reason)
    if not answer.at_eof():  # mostly the end follows, after which the connection can serve again
        with suppress(TimeoutError, Cut):
            async with asyncio.timeout(LINGER_S):
                await answer.flow(passage.pass_rest)
    await reply.end_stream()


class Passage:
    """Bytes from a replica's connection to the client's, without a task that wakes in between."""

    __slots__ = ("_answer", "_pulse", "_reply", "_silence")

    def __init__(self, answer: Opened, reply: Reply, silence: Silence) -> None:
        self._answer = answer
        self._reply = reply
        self._silence = silence
        silence.since = time.monotonic()
        self._pulse = reply.pulse

    def pass_on(self, chunk: bytes) -> bool:
        """True after the terminator. The replica is held back while the client lags."""
        silence = self._silence
        now = time.monotonic()
        self._pulse.beat(chunk, now if silence.since is None else silence.since, now)
        if self._reply.write(chunk):
            silence.since = now
        else:
            silence.since = None
            self._answer.pause()
            self._reply.when_writable(self._go_on)
        return self._reply.terminated

    def pass_rest(self, chunk: bytes) -> bool:
        """Behind the terminator."""
        self.pass_on(chunk)
        return False

    def _go_on(self) -> None:
        self._silence.since = time.monotonic()
        self._answer.resume()


async def relay_late(answer: Opened, reply: Reply, silence: Silence) -> None:
    """An answer that is no stream, for a client that was told 200 meanwhile: an error in band."""
    if answer.status < 400:
        raise problems.not_a_stream(answer.headers.get("content-type", ""))
    body = await read_whole(answer, silence, LATE_ERROR_MAX_BYTES)
    try:
        payload = parse_object(body)
    except Problem:
        payload = {}
    if not isinstance(payload.get("error"), dict):
        raise problems.late_error(answer.status, body.decode("utf-8", "replace"))
    await reply.fail_in_band(payload)


async def read_whole(answer: Opened, silence: Silence, limit_bytes: int) -> bytes:
    """The complete body. Raises Problem 502 for one that is cut or too large."""
    pieces: list[bytes] = []
    size_bytes = 0
    try:
        while piece := await answer.readany():
            silence.since = time.monotonic()
            pieces.append(piece)
            size_bytes += len(piece)
            if size_bytes > limit_bytes:
                raise problems.answer_too_large(limit_bytes)
    except Cut as error:
        raise problems.answer_cut(str(error)) from None
    return b"".join(pieces)


def passed_headers(answer: Opened) -> Headers:
    """The replica's headers but for those that belong to a connection or to us."""
    return [
        (name, value)
        for name, value in answer.raw_headers
        if name not in OWN_HEADERS and not FORBIDDEN.search(value)
    ]
