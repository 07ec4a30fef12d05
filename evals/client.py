"""Asks a server one request and tells how it went, as an Observation. Never raises for a failure.

Knows HTTP and moments; `answers.py` knows what the bytes mean. While an answer comes it only notes
bytes and moments, and reads them afterwards, so that many streams at once do not delay each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import orjson

from evals.answers import Said, Unreadable, problem_of, read_stream, read_whole
from evals.item import Item
from telemetry import FROM_CACHE, Observation, Outcome
from telemetry.trace import TRACEPARENT

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
TIMEOUT_S = 300.0
KEPT_ALIVE_S = 60.0
LIST_TIMEOUT_S = 10.0
ERROR_MAX_BYTES = 2**16
HEADER_CHARS_MAX = 128

_TIMEOUTS = frozenset((408, 504))
_OVERLOADED = frozenset((429, 503))
_BROKEN = frozenset(("gateway_stopped", "no_replica"))  # codes of a 503 that sheds no load


# item, arm, source, block, repeat -> the `traceparent` that the request carries
Traced = Callable[[str, str, str, int, int], str]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a tier promises; None: nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(slots=True)
class _Exchange:
    """One request under way, with moments of the caller's clock."""

    sent: float
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float | None = None
    traceparent: str = ""


class Client:
    """Connections to one base URL, with or without its `/v1`. Use it as a context.

    `targets` by tier become those of its observations. `timeout_s` limits a whole request.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        targets: Mapping[str, Targets] | None = None,
        headers: Mapping[str, str] | None = None,
        traced: Traced | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s = timeout_s
        self._targets = targets or {}
        self._traced = traced
        self._headers = {"content-type": "application/json", **(headers or {})}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=True,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(
        self,
        item: Item,
        arm: str,
        source: str,
        block: int = 0,
        repeat: int = 0,
        *,
        now: Callable[[], float],
        salt: str | None = None,
        traced: bool = True,
    ) -> Observation:
        """Sends the item and waits for its whole answer. Not `traced`, it joins no span of ours.

        `now` gives seconds since the run began and has to be monotonic. `salt` keeps arms apart
        that share a cache (`cache_salt`). A body without `stream` is asked for as a stream, and for
        its usage; with `stream: false` there is no ttft. Only a cancelled task raises.
        """
        body = body_of(item.body, salt)
        exchange, said = _Exchange(now()), Said(scored_from=int(item.meta.get("scored_from", 0)))
        if traced and self._traced is not None:
            exchange.traceparent = self._traced(item.id, arm, source, block, repeat)
        outcome, problem = await self._outcome(item, arm, body, exchange, said, now)
        ended = exchange.ended if exchange.ended is not None else now()
        tier = exchange.headers.get("x-headgate-tier", "") or item.tier
        targets = self._targets.get(tier, Targets())
        return Observation(
            id=item.id,
            source=source,
            arm=arm,
            cluster=item.cluster,
            block=block,
            repeat=repeat,
            tier=tier,
            tenant=str(item.meta.get("tenant", "")),
            turn=item.turn,
            at_s=exchange.sent,
            outcome=outcome,
            status=exchange.status,
            problem=problem,
            ttft_s=None if said.first is None else said.first - exchange.sent,
            e2e_s=ended - exchange.sent,
            ttft_target_s=targets.ttft_s,
            tpot_target_s=targets.tpot_s,
            trimmed_tokens=_number(exchange.headers.get("x-headgate-trimmed-tokens")),
            max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
            replica=_replica(exchange.headers),
            **said.fields(),
        )

    async def models(self) -> list[str]:
        """What the server offers; nothing where it does not say."""
        assert self._session is not None
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                async with self._session.get(
                    f"{self.url}/v1/models", headers=self._headers
                ) as told:
                    data = orjson.loads(await told.read())["data"]
                    return [str(one["id"]) for one in data]
        except (aiohttp.ClientError, KeyError, OSError, TypeError, ValueError):
            return []

    async def _outcome(
        self,
        item: Item,
        arm: str,
        body: Mapping[str, Any],
        exchange: _Exchange,
        said: Said,
        now: Callable[[], float],
    ) -> tuple[Outcome, str]:
        """How it ended, and what went wrong in words."""
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._exchange(item, arm, body, exchange, now)
        except TimeoutError:
            _try_to_read(body, exchange, said)
            return "timeout", f"no whole answer within {self.timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            _try_to_read(body, exchange, said)
            return "error", f"{type(error).__name__}: {error}"
        except orjson.JSONEncodeError as error:
            return "error", f"the request cannot be written as JSON: {error}"
        whole = b"".join(piece for _, piece in exchange.reads)
        if exchange.status != 200:
            problem, code = problem_of(whole[:ERROR_MAX_BYTES])
            return _refusal(exchange.status, code), problem or f"status {exchange.status}"
        try:
            _read(body, exchange, said)
        except Unreadable as error:
            return _late_refusal(error.code), str(error)
        return "ok", ""

    async def _exchange(
        self,
        item: Item,
        arm: str,
        body: Mapping[str, Any],
        exchange: _Exchange,
        now: Callable[[], float],
    ) -> None:
        assert self._session is not None, "a client is used as a context: async with Client(...)"
        data = orjson.dumps(body)
        headers = self._headers | {"x-request-id": _plain(f"{arm}-{item.id}")}
        if item.tier:
            headers["x-headgate-tier"] = _plain(item.tier)
        if session := item.meta.get("session"):
            headers["x-session-id"] = _plain(str(session))
        if exchange.traceparent:
            headers[TRACEPARENT] = exchange.traceparent
        path = CHAT_PATH if "messages" in body else COMPLETIONS_PATH
        exchange.sent = now()
        async with self._session.post(
            self.url + path, data=data, headers=headers, allow_redirects=False
        ) as response:
            exchange.status = response.status
            exchange.headers = response.headers
            while piece := await response.content.readany():
                exchange.reads.append((now(), piece))
            exchange.ended = now()


def body_of(body: Mapping[str, Any], salt: str | None = None) -> dict[str, Any]:
    """What is sent for a request: as a stream that tells its usage, unless it says otherwise."""
    sent = {"stream": True, **body}
    if sent["stream"]:
        sent["stream_options"] = {**(sent.get("stream_options") or {}), "include_usage": True}
    if salt is not None:
        sent["cache_salt"] = salt
    return sent


def _plain(text: str) -> str:
    """As a header's value can be."""
    return "".join(one if "!" <= one <= "~" else "_" for one in text[:HEADER_CHARS_MAX])


def _read(body: Mapping[str, Any], exchange: _Exchange, said: Said) -> None:
    kind = exchange.headers.get("content-type", "")
    if body["stream"] and "json" not in kind:
        read_stream(exchange.reads, said)
    else:
        at = exchange.ended if exchange.ended is not None else exchange.sent
        read_whole(b"".join(piece for _, piece in exchange.reads), said, at)


def _try_to_read(body: Mapping[str, Any], exchange: _Exchange, said: Said) -> None:
    """What came before a failure: a first token that was in time was in time."""
    with suppress(Unreadable):
        _read(body, exchange, said)


def _refusal(status: int, code: str) -> Outcome:
    """A server that sheds load refuses; anything else that is no answer is an error."""
    if status in _TIMEOUTS:
        return "timeout"
    return "refused" if status in _OVERLOADED and code not in _BROKEN else "error"


def _late_refusal(code: str) -> Outcome:
    """Of an error inside a stream, whose status was sent before."""
    return "timeout" if "timeout" in code or code == "deadline_exceeded" else "error"


def _replica(headers: Mapping[str, str]) -> str:
    if headers.get("x-headgate-cache") == "hit":
        return FROM_CACHE
    return headers.get("x-headgate-replica", "")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None
