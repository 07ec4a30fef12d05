"""Stands before a worker and breaks some of its answers, in ways that are drawn beforehand.

Knows HTTP and the shape of a stream; what becomes of a broken answer is the gateway's. It can also
miscount: tell another usage than the worker's.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from runtime.wire import MARKS_HEADER, TOKEN_IDS_HEADER

PASSED = (
    "authorization", "content-type", TOKEN_IDS_HEADER, MARKS_HEADER, "x-headgate-tier",
    "x-request-id",
)  # fmt: skip
BEFORE = ("reset", "500", "503")  # any answer has begun
WITHIN = ("cut", "garbled", "stalled")  # a stream
STALL_S = 30.0  # longer than any gateway waits here

DETAILS = "completion_tokens_details"
ACCEPTED, REJECTED = "accepted_prediction_tokens", "rejected_prediction_tokens"

Edit = Callable[[dict[str, Any]], None]


def _guesses(usage: dict[str, Any], accepted: int = 0, rejected: int = 0) -> None:
    """So many more of them than there were."""
    told = usage[DETAILS]
    usage[DETAILS] = told | {
        ACCEPTED: told[ACCEPTED] + accepted, REJECTED: told[REJECTED] + rejected
    }  # fmt: skip


# What is told instead of a usage, by the invariant that it breaks.
MISCOUNTS: Mapping[str, Edit] = {
    "billed_is_sum": lambda usage: usage.update(total_tokens=usage["total_tokens"] + 1),
    "cached_within_templated": lambda usage: usage.update(
        prompt_tokens_details={"cached_tokens": usage["prompt_tokens"] + 1}
    ),
    "emitted_as_streamed": lambda usage: usage.update(
        completion_tokens=usage["completion_tokens"] - 1, total_tokens=usage["total_tokens"] - 1
    ),
    "templated_as_counted": lambda usage: usage.update(
        prompt_tokens=usage["prompt_tokens"] + 1, total_tokens=usage["total_tokens"] + 1
    ),
    "accepted_within_emitted": lambda usage: _guesses(
        usage, accepted=usage["completion_tokens"] - usage[DETAILS][ACCEPTED] + 1
    ),
    "accepted_as_marked": lambda usage: _guesses(
        usage, accepted=-1 if usage[DETAILS][ACCEPTED] else 1
    ),
    "rejected_as_marked": lambda usage: _guesses(usage, rejected=1),
}
# What a stream has to tell, lest nobody could know that its usage does not tell the truth.
MARKED = ("accepted_as_marked", "rejected_as_marked")
MARKS = b'"headgate":{'


@dataclass(slots=True)
class Faulty:
    """A replica in front of `worker`; `share` of its answers break, `lies` of them miscount."""

    worker: str
    rng: random.Random
    share: float = 0.0
    lies: float = 0.0
    made: Counter[str] = field(default_factory=Counter)
    session: aiohttp.ClientSession | None = None
    _runner: web.AppRunner | None = None

    async def __aenter__(self) -> Faulty:
        self.session = aiohttp.ClientSession(
            self.worker, timeout=aiohttp.ClientTimeout(total=None, sock_read=120)
        )
        application = web.Application(client_max_size=2**26)
        application.router.add_get("/{path:.*}", self._get)
        application.router.add_post("/{path:.*}", self._post)
        self._runner = web.AppRunner(application, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        assert self.session is not None
        await self._runner.cleanup()
        await self.session.close()

    @property
    def port(self) -> int:
        assert self._runner is not None
        port: int = self._runner.addresses[0][1]
        return port

    async def _get(self, request: web.Request) -> web.Response:
        assert self.session is not None
        async with self.session.get(request.rel_url) as answer:
            body = await answer.read()
            return web.Response(body=body, status=answer.status, content_type=answer.content_type)

    async def _post(self, request: web.Request) -> web.StreamResponse:
        assert self.session is not None
        body = await request.read()
        fault = self.rng.choice(BEFORE + WITHIN) if self.rng.random() < self.share else ""
        if fault in BEFORE:
            self.made[fault] += 1
            return _refuse(request, fault)
        headers = {name: request.headers[name] for name in PASSED if name in request.headers}
        async with self.session.post(request.rel_url, data=body, headers=headers) as answer:
            if answer.content_type != "text/event-stream":
                told = await answer.read()
                return web.Response(
                    body=told, status=answer.status, content_type="application/json"
                )
            out = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await out.prepare(request)
            with suppress(ConnectionError):  # the gateway has gone, since its client has
                await self._stream(request, answer, out, fault)
            return out

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, out: web.StreamResponse,
        fault: str,
    ) -> None:  # fmt: skip
        after = self.rng.randrange(12) if fault else -1
        told, marked = TOKEN_IDS_HEADER in request.headers, False
        events = 0
        held = b""
        async for data in answer.content.iter_any():
            *whole, held = (held + data).split(b"\n\n")
            for event in whole:
                if events == after:
                    self.made[fault] += 1
                    await _break(request, out, fault)
                    return
                events += 1
                marked = marked or MARKS in event
                await out.write(self._told(event, _lies(told, marked)) + b"\n\n")

    def _told(self, event: bytes, names: Sequence[str]) -> bytes:
        """The event, or the usage that is told instead of the worker's."""
        at = event.find(b"data: {")
        if not self.lies or b'"usage":{' not in event or self.rng.random() >= self.lies:
            return event
        payload = orjson.loads(event[at + 6 :])
        name = min(names, key=self.made.__getitem__)  # the one that was told least often
        MISCOUNTS[name](payload["usage"])
        self.made[name] += 1
        return event[: at + 6] + orjson.dumps(payload)


def _lies(told: bool, marked: bool) -> Sequence[str]:
    """Those that break one invariant alone, of a stream that tells its tokens, or marks them."""
    return [
        name
        for name in sorted(MISCOUNTS)
        if (name != "emitted_as_streamed" or told)
        and (name not in MARKED or marked)
        and (name != "accepted_within_emitted" or not marked)
    ]


def _refuse(request: web.Request, fault: str) -> web.Response:
    if fault == "reset":
        _abort(request)
    error = {"message": "it breaks on purpose", "type": "server_error", "code": "broken"}
    status = 503 if fault == "503" else 500
    return web.json_response({"error": error}, status=status, headers={"retry-after": "0.05"})


async def _break(request: web.Request, out: web.StreamResponse, fault: str) -> None:
    if fault == "garbled":
        await out.write(b'data: {"id":"chatcmpl-1","choices":[{"delta":{"cont\n\n')
        return
    if fault == "stalled":
        await asyncio.sleep(STALL_S)
    _abort(request)


def _abort(request: web.Request) -> None:
    if isinstance(request.transport, asyncio.Transport):
        request.transport.abort()
