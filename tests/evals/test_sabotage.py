"""A server spoiled on purpose: what it changes, how late it is, and that it passes the rest on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from evals.client import Client
from evals.item import Item
from evals.sabotage import Proxy, is_spoiled, serve, spoiled_line, spoiled_text

ANSWER = "Order 12 costs 713 euros."
TOKENS = 6
PAUSE_S = 0.03


async def _stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for at in range(TOKENS):
        await asyncio.sleep(PAUSE_S)
        piece = ANSWER[at * 5 : at * 5 + 5]
        chunk = {"choices": [{"index": 0, "delta": {"content": piece}}]}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


async def _models(_request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "a"}]}, headers={"x-headgate-replica": "r1"})


@asynccontextmanager
async def proxied(wrong: float, slow: float) -> AsyncIterator[tuple[str, str]]:
    """A server that streams, and the proxy before it."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", _stream)
    app.router.add_get("/v1/models", _models)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    said: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(Proxy(url, wrong, slow, 7), said.set_result))
    try:
        yield url, await said
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await runner.cleanup()


async def _asked(url: str) -> tuple[str, float, float]:
    clock = asyncio.get_running_loop().time
    item = Item("1", "1", 0, {"model": "a", "messages": [{"role": "user", "content": "?"}]})
    async with Client(url) as client:
        seen = await client.ask(item, "a", "suite:s", now=clock)
    assert seen.ok, seen.problem
    assert seen.ttft_s is not None
    assert seen.e2e_s is not None
    return seen.text, seen.ttft_s, seen.e2e_s


def test_a_spoiled_answer_has_nothing_right_in_it_and_its_form() -> None:
    """Every letter and digit is another one; what separates them is the same."""

    async def check() -> None:
        async with proxied(wrong=1.0, slow=0.0) as (_, proxy):
            text, _, _ = await _asked(proxy)
        assert text == spoiled_text(ANSWER)
        assert not any(a == b for a, b in zip(text, ANSWER, strict=True) if a.isalnum())
        assert "713" not in text

    asyncio.run(check())


def test_a_slow_answer_is_slower_throughout_and_says_the_same() -> None:
    """Half as long again: the first token, too, not only the last."""

    async def check() -> None:
        async with proxied(wrong=0.0, slow=0.5) as (server, proxy):
            text, first, whole = await _asked(server)
            same, first_slow, whole_slow = await _asked(proxy)
        assert same == text
        assert first_slow >= 1.4 * PAUSE_S
        assert whole_slow >= 1.4 * TOKENS * PAUSE_S
        assert first_slow < whole_slow
        assert first < whole

    asyncio.run(check())


def test_what_is_no_answer_passes_with_its_headers() -> None:
    async def check() -> None:
        async with proxied(wrong=1.0, slow=0.0) as (_, proxy), Client(proxy) as client:
            session = client._session
            assert session is not None
            async with session.get(f"{proxy}/v1/models") as answer:
                assert await answer.json() == {"data": [{"id": "a"}]}
                assert answer.headers["x-headgate-replica"] == "r1"

    asyncio.run(check())


def test_a_dead_server_behind_it_is_told_as_an_error() -> None:
    async def check() -> None:
        said: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve(Proxy("http://127.0.0.1:1", 0, 0, 7), said.set_result))
        async with Client(await said) as client:
            seen = await client.ask(Item("1", "1", 0, {"messages": []}), "a", "s", now=lambda: 0.0)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert (seen.outcome, seen.status) == ("error", 502)

    asyncio.run(check())


def test_the_share_of_spoiled_answers_is_what_was_asked_for() -> None:
    bodies = [str(number).encode() for number in range(4000)]
    found = sum(is_spoiled(body, 0.05, 7) for body in bodies) / len(bodies)
    assert found == pytest.approx(0.05, abs=0.012)
    assert [is_spoiled(body, 0.05, 7) for body in bodies] == [
        is_spoiled(body, 0.05, 7) for body in bodies
    ]


@pytest.mark.parametrize("line", [b"data: [DONE]\n", b": keep-alive\n", b"\n", b"data: {half\n"])
def test_lines_that_say_nothing_are_left_alone(line: bytes) -> None:
    assert spoiled_line(line) == line


def test_arguments_of_tools_are_spoiled_too() -> None:
    call = {"function": {"name": "find", "arguments": '{"id": 12}'}}
    line = b"data: " + json.dumps({"choices": [{"delta": {"tool_calls": [call]}}]}).encode()
    changed = json.loads(spoiled_line(line)[6:])
    assert changed["choices"][0]["delta"]["tool_calls"][0]["function"] == {
        "name": "find", "arguments": '{"je": 23}',
    }  # fmt: skip
