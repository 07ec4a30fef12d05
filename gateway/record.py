"""Which requests are recorded, and what of them is handed to the process that writes.

On the way of a request it decides and holds on to bytes; many requests together go through a pipe,
and what that does not take is dropped and counted: recording never holds anybody up.
"""

from __future__ import annotations

import asyncio
import marshal
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from gateway.call import Call, ClientGone
from gateway.record_pipe import Pipe
from gateway.record_sample import session_of, within_share
from gateway.record_writer import LENGTH, MARSHAL_VERSION, MODULE, Entry
from gateway.reply import Reply
from policies.recording import Record
from runtime.wire import Problem
from telemetry.genai import LEAVES

HEADER = b"x-headgate-record"
YES, NO = b"yes", b"no"
BODY_MAX_BYTES = 2**20  # a larger request or answer is not recorded
BATCH_BYTES = 2**18
FLUSH_S = 0.5  # what has come goes to the writer together; answers that grow are looked at

RawHeaders = Sequence[tuple[bytes, bytes]]


class Recorder:
    """Records by one policy, through one writing process. Use it as a context."""

    def __init__(
        self, settings: Record, tokens_of: Callable[[str], int | None] = lambda _receipt: None
    ) -> None:
        """`tokens_of` a receipt: how long the prompt is by the gateway's count."""
        self.settings = settings
        self.tokens_of = tokens_of
        self.recorded = 0
        self.dropped = 0  # the writer was too slow, or gone
        self.too_large = 0
        self.pipe = Pipe(MODULE, settings.model_dump_json(), self._lose)
        self._under_way: set[Recording] = set()
        self._batch: list[Entry] = []
        self._batch_bytes = 0
        self._looking: asyncio.TimerHandle | None = None

    def told(self) -> dict[str, int]:
        return {
            "recorded": self.recorded,
            "dropped": self.dropped,
            "too_large": self.too_large,
        }

    async def __aenter__(self) -> Self:
        await self.pipe.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._flush()
        if self._looking is not None:
            self._looking.cancel()
        await self.pipe.end()

    def request(
        self, call: Call, headers: RawHeaders, tenant: str, reply: Reply
    ) -> Recording | None:
        """What records this request; None for one that is not."""
        settings = self.settings
        wanted = None
        for name, value in headers:
            if name == HEADER:
                wanted = value
                break
        if wanted == NO or (settings.consent == "asked" and wanted != YES):
            return None
        if settings.tenants and tenant not in settings.tenants:
            return None
        named = call.session(())
        if settings.share < 1:
            session = session_of(named, call.data, tenant)
            if not within_share(session or reply.request_id, settings.share):
                return None
        if len(call.body) > BODY_MAX_BYTES:
            self.too_large += 1
            return None
        return Recording(self, call, named, tenant, reply)

    def begin(self, recording: Recording) -> None:
        self._under_way.add(recording)
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(FLUSH_S, self._look)

    def end(self, recording: Recording, entry: Entry | None) -> None:
        """Takes what has come of it, None for what was too large, to the writer if that can."""
        self._under_way.discard(recording)
        if entry is None:
            self.too_large += 1
        elif not self.pipe.takes:
            self.dropped += 1
        else:
            self.recorded += 1
            self._batch.append(entry)
            self._batch_bytes += len(entry.request) + len(entry.answer)
            if self._batch_bytes > BATCH_BYTES:
                self._flush()

    def _look(self) -> None:
        """Again while anything is under way."""
        self._flush()
        for one in self._under_way:
            one.reply.kept()
        self._looking = None
        if self._under_way or self.pipe.waits:
            self._looking = asyncio.get_running_loop().call_later(FLUSH_S, self._look)

    def _flush(self) -> None:
        """Writes what has come together: waking the writer costs more than a record does."""
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if batch:
            frame = marshal.dumps([tuple(one) for one in batch], MARSHAL_VERSION)
            self.pipe.send(LENGTH.pack(len(frame)) + frame, len(batch))
        else:
            self.pipe.push()

    def _lose(self, count: int) -> None:
        self.recorded -= count
        self.dropped += count


class Recording:
    """One request, from when it is known to its end. A context that lets every error pass."""

    __slots__ = ("_call", "_named", "_recorder", "_tenant", "reply")

    def __init__(
        self, recorder: Recorder, call: Call, named: str | None, tenant: str, reply: Reply
    ) -> None:
        self._recorder = recorder
        self._call = call
        self._named = named
        self._tenant = tenant
        self.reply = reply

    def __enter__(self) -> Self:
        self.reply.keep(BODY_MAX_BYTES)
        self._recorder.begin(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = self.reply.kept()
        entry = None if kept is None else self._entry(error, kept.getvalue())
        self._recorder.end(self, entry)

    def _entry(self, error: BaseException | None, answer: bytes) -> Entry:
        """It begins when its answer was due, as its trace has it."""
        reply, call, trail = self.reply, self._call, self.reply.trail
        assert trail is not None, "it began before the request was read"
        spoke = reply.pulse.first_at
        tier = receipt = ""
        for name, value in reply.more:
            if name == b"x-headgate-tier":
                tier = value.decode("latin-1")
            elif name == b"x-headgate-receipt":
                receipt = value.decode("latin-1")
        return Entry(
            named=self._named,
            request_id=reply.request_id,
            tenant=self._tenant,
            tier=tier,
            began=trail.at_s(trail.due),
            took_s=time.monotonic() - trail.due,
            ttft_s=None if spoke is None else spoke - trail.due,
            status=reply.status,
            error=_error(error, reply.status),
            receipt=receipt,
            prompt_tokens=self._recorder.tokens_of(receipt),
            arm=trail.arm,
            trace=trail.trace_id,
            request=call.body,
            answer=answer,
        )


def _error(error: BaseException | None, status: int) -> str:
    """What `error.type` says; empty for an answer that came to its end."""
    if isinstance(error, Problem):
        return error.code or str(error.status)
    if isinstance(error, ClientGone | asyncio.CancelledError):
        return LEAVES
    if error is not None:
        return type(error).__name__
    return "" if status == 200 else str(status)
