"""A server spoiled on purpose: `python -m evals.sabotage URL`, a proxy that slows all answers and
makes some of them wrong. A gate that does not find it out is not sensitive enough to be believed.

Knows streams of server-sent events and JSON bodies; what it cannot read it passes on.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from collections.abc import AsyncIterable, Callable
from typing import Any

import orjson
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_TURNED = str.maketrans(
    _LETTERS + _LETTERS.upper() + _DIGITS,
    _LETTERS[1:] + "a" + _LETTERS[1:].upper() + "A" + _DIGITS[1:] + "0",
)
_DROPPED = ("host", "content-length", "transfer-encoding", "connection", "content-encoding")
BODY_MAX_BYTES = 2**26


def spoiled_text(text: str) -> str:
    """Every letter and digit turned to the next: nothing that was right is right."""
    return text.translate(_TURNED)


def is_spoiled(body: bytes, share: float, seed: int) -> bool:
    """By the request alone, so that a run that is repeated spoils the same."""
    drawn = hashlib.sha256(f"{seed}:".encode() + body).digest()
    return int.from_bytes(drawn[:8], "big") < share * 2**64


def spoiled(payload: Any) -> Any:
    """An answer or a chunk of one with all that was said in it changed."""
    for choice in payload.get("choices") or ():
        for said in (choice, choice.get("delta"), choice.get("message")):
            if isinstance(said, dict):
                _spoil(said)
    return payload


def _spoil(said: dict[str, Any]) -> None:
    for name in ("content", "text", "refusal"):
        if isinstance(said.get(name), str):
            said[name] = spoiled_text(said[name])
    for call in said.get("tool_calls") or ():
        function = call.get("function") or {}
        if isinstance(function.get("arguments"), str):
            function["arguments"] = spoiled_text(function["arguments"])


def spoiled_line(line: bytes) -> bytes:
    """One line of an event stream."""
    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
        return line
    try:
        return b"data: " + orjson.dumps(spoiled(orjson.loads(line[5:]))) + b"\n"
    except (orjson.JSONDecodeError, AttributeError):
        return line


class Proxy:
    """Passes everything on to `url`; answers `slow` later and, in a share of them, `wrong`."""

    def __init__(self, url: str, wrong: float, slow: float, seed: int) -> None:
        self._url = url
        self._wrong = wrong
        self._slow = slow
        self._seed = seed
        self._session: ClientSession | None = None

    async def open(self, _app: web.Application) -> Any:
        async with ClientSession(
            connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)
        ) as self._session:
            yield

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        began = _now()
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _DROPPED}
        wrong = request.method == "POST" and is_spoiled(body, self._wrong, self._seed)
        change = spoiled_line if wrong else _same
        try:
            async with self._session.request(
                request.method, self._url + request.path_qs, data=body, headers=headers
            ) as answer:
                kept = {k: v for k, v in answer.headers.items() if k.lower() not in _DROPPED}
                response = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                if answer.content_type == "text/event-stream":
                    await self._relay(answer.content, response, began, change)
                else:
                    whole = await answer.read()
                    await self._wait(began, _now())
                    await response.write(_spoiled_body(whole) if wrong else whole)
                await response.write_eof()
                return response
        except ClientError as error:
            return web.json_response({"error": {"message": str(error)}}, status=502)

    async def _relay(
        self,
        lines: AsyncIterable[bytes],
        response: web.StreamResponse,
        began: float,
        change: Callable[[bytes], bytes],
    ) -> None:
        """Each line as late as a slower server would have sent it, by when it came."""
        came: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def read() -> None:
            try:
                async for line in lines:
                    came.put_nowait((_now(), line))
            finally:
                came.put_nowait((_now(), b""))

        reading = asyncio.create_task(read())
        try:
            while (next_one := await came.get())[1]:
                at, line = next_one
                await self._wait(began, at)
                await response.write(change(line))
            await reading
        finally:
            reading.cancel()

    async def _wait(self, began: float, came: float) -> None:
        await asyncio.sleep(began + (1 + self._slow) * (came - began) - _now())


def _now() -> float:
    return asyncio.get_running_loop().time()


def _same(line: bytes) -> bytes:
    return line


def _spoiled_body(body: bytes) -> bytes:
    try:
        return orjson.dumps(spoiled(orjson.loads(body)))
    except (orjson.JSONDecodeError, AttributeError):
        return body


async def serve(proxy: Proxy, say: Callable[[str], None]) -> None:
    """Until it is cancelled; says where."""
    app = web.Application(client_max_size=BODY_MAX_BYTES)
    app.cleanup_ctx.append(proxy.open)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        say(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m evals.sabotage", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--wrong", type=float, default=0.05)
    parser.add_argument("--slow", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    proxy = Proxy(given.url.rstrip("/"), given.wrong, given.slow, given.seed)
    asyncio.run(serve(proxy, lambda url: print(url, flush=True)))


if __name__ == "__main__":
    main()
