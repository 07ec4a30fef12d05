"""Which requests are recorded, and what of them is handed to the process that writes.

On the way of a request it decides, copies and sends bytes through a pipe, nothing else. What the
pipe does not take is dropped and counted: recording never holds anybody up.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson

from gateway.call import Call, ClientGone
from gateway.genai import LEAVES
from gateway.record_writer import LENGTHS
from gateway.reply import Copy, Reply
from policies.recording import Record
from runtime.wire import Problem

log = logging.getLogger("headgate.gateway")

HEADER = b"x-headgate-record"
YES, NO = b"yes", b"no"
BODY_MAX_BYTES = 2**20  # a larger request or answer is not recorded
WAITING_MAX_BYTES = 8 * 2**20  # in front of the pipe
BATCH_BYTES = 2**18
FLUSH_S = 0.2  # what has come goes to the writer together
AGAIN_S = 10.0  # until a writer that died is started again
END_S = 10.0  # for the writer to finish its file
TOLD_BY_CHARS = 512  # of the beginning and of the end of a first message
SESSION_FIELDS = ("prompt_cache_key", "user")
ROOT = Path(__file__).resolve().parent.parent

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
        self._process: asyncio.subprocess.Process | None = None
        self._started = 0.0
        self._starting: asyncio.Task[None] | None = None
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._flushing: asyncio.TimerHandle | None = None

    def told(self) -> dict[str, int]:
        return {
            "recorded": self.recorded,
            "dropped": self.dropped,
            "too_large": self.too_large,
        }

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._flush()
        with suppress(OSError):
            self._process.stdin.close()
        try:
            async with asyncio.timeout(END_S):
                await self._process.wait()
        except TimeoutError:
            log.warning("the recorder did not end in %g s and was killed", END_S)
            self._process.kill()
            await self._process.wait()

    async def _start(self) -> None:
        self._started = time.monotonic()
        command = (sys.executable, "-m", "gateway.record_writer", self.settings.model_dump_json())
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, cwd=ROOT
        )

    def request(
        self, call: Call, headers: RawHeaders, tenant: str, reply: Reply
    ) -> Recording | None:
        """What records this request; None for one that is not."""
        wanted = next((value for name, value in headers if name == HEADER), None)
        if wanted == NO or (self.settings.consent == "asked" and wanted != YES):
            return None
        if self.settings.tenants and tenant not in self.settings.tenants:
            return None
        session = session_of(call, tenant)
        if not within_share(session or reply.request_id, self.settings.share):
            return None
        if len(call.body) > BODY_MAX_BYTES:
            self.too_large += 1
            return None
        return Recording(self, call, session, tenant, reply)

    def send(self, facts: bytes, request: bytes, answer: bytes) -> None:
        """To the writer, if it can take it."""
        pipe = self._process.stdin if self._process is not None else None
        if pipe is None or pipe.is_closing() or self._gone():
            self.dropped += 1
            self._start_again()
        elif pipe.transport.get_write_buffer_size() > WAITING_MAX_BYTES:
            self.dropped += 1
        else:
            lengths = LENGTHS.pack(len(facts), len(request), len(answer))
            self._batch += (lengths, facts, request, answer)
            self._batch_bytes += len(facts) + len(request) + len(answer)
            self.recorded += 1
            if self._flushing is None:
                self._flushing = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)
            elif self._batch_bytes > BATCH_BYTES:
                self._flush()

    def _flush(self) -> None:
        """Writes what has come together: waking the writer costs more than a record does."""
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        pipe = self._process.stdin if self._process is not None else None
        if batch and pipe is not None and not pipe.is_closing():
            pipe.write(b"".join(batch))

    def _gone(self) -> bool:
        return self._process is not None and self._process.returncode is not None

    def _start_again(self) -> None:
        """Not at once: what kills it may well kill the next one."""
        if time.monotonic() - self._started < AGAIN_S or (
            self._starting is not None and not self._starting.done()
        ):
            return
        log.warning("the recorder has ended and is started again")
        self._starting = asyncio.create_task(self._start())


class Tape(Copy):
    """A copy that knows when a stream's first piece came; a keep-alive comment is none."""

    first: float | None = None

    def stream(self, chunk: bytes) -> bool:
        pieces, outgoing = self._pieces, self._outgoing
        if pieces is not None:  # all of this again for every chunk: nothing is called
            if self.first is None:
                self.first = time.time()
            pieces.append(chunk)
            self._size_bytes += len(chunk)
            if self._size_bytes > BODY_MAX_BYTES:
                self._pieces = None
        assert outgoing is not None
        return outgoing.stream(chunk)


class Recording:
    """One request, from when it is known to its end. A context that lets every error pass."""

    __slots__ = ("_began", "_call", "_recorder", "_reply", "_session", "_tape", "_tenant")

    def __init__(
        self, recorder: Recorder, call: Call, session: str, tenant: str, reply: Reply
    ) -> None:
        self._recorder = recorder
        self._call = call
        self._session = session
        self._tenant = tenant
        self._reply = reply
        self._tape = reply.through(lambda send, out: Tape(send, out, BODY_MAX_BYTES))
        self._began = time.time()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tape = self._tape
        answer = tape.so_far()
        if answer is None:
            self._recorder.too_large += 1
            return
        span_id = secrets.token_hex(8)
        told = {name: value.decode("latin-1") for name, value in self._reply.more}
        receipt = told.get(b"x-headgate-receipt", "")
        facts = {
            "session": self._session or span_id,
            "conversation": bool(self._session),
            "span_id": span_id,
            "path": self._call.path,
            "tenant": self._tenant,
            "tier": told.get(b"x-headgate-tier", ""),
            "began": self._began,
            "ended": time.time(),
            "status": tape.status,
            "error": _error(error, tape.status),
            "ttft_s": None if tape.first is None else tape.first - self._began,
            "consent": self._recorder.settings.consent,
            "receipt": receipt,
            "prompt_tokens": self._recorder.tokens_of(receipt),
        }
        self._recorder.send(orjson.dumps(facts), self._call.body, answer)


def _error(error: BaseException | None, status: int) -> str:
    """What `error.type` says; empty for an answer that came to its end."""
    if isinstance(error, Problem):
        return error.code or str(error.status)
    if isinstance(error, ClientGone | asyncio.CancelledError):
        return LEAVES
    if error is not None:
        return type(error).__name__
    return "" if status == 200 else str(status)


def session_of(call: Call, tenant: str) -> str:
    """What the request belongs to: by what the client says, else by the first thing that a user
    said, which is the same in every turn of a conversation; empty where there is neither."""
    named = call.session(SESSION_FIELDS)
    if named is None:
        messages = call.data.get("messages")
        said = (
            one.get("content")
            for one in messages if isinstance(one, dict) and one.get("role") == "user"
        ) if isinstance(messages, list) else iter(())  # fmt: skip
        first = next(said, None)
        if first is None:
            return ""
        text = first if isinstance(first, str) else orjson.dumps(first).decode()
        known = f"{len(text)} {text[:TOLD_BY_CHARS]} {text[-TOLD_BY_CHARS:]}"
        named = blake2b(known.encode("utf-8", "replace"), digest_size=16).hexdigest()
    return f"{tenant}/{named}"


def within_share(name: str, share: float) -> bool:
    """Whether so named things belong to a share of all of them; always the same ones."""
    if share >= 1:
        return True
    digest = blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 < share
