"""`python -m gateway`, as the supervisor starts it: it listens, drains, and ends with 0."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.gateway.world import DONE, HELLO, STREAMED, Fake, Peer, held, on_loop, until, upstream

ROOT = Path(__file__).parents[2]
CHUNK = b'data: {"choices":[]}\n\n'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@asynccontextmanager
async def process(fake: Fake, folder: Path, settings: str) -> AsyncIterator[tuple]:
    policy = folder / "policy.yaml"
    policy.write_text(f"version: 1\ngateway: {settings}\nruntime: {{model: pocket}}\n")
    port = free_port()
    arguments = ["-m", "gateway", policy, "--port", port, "--replica", fake.url]
    child = await asyncio.create_subprocess_exec(
        sys.executable, *map(str, arguments), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=15) as client:
        try:
            while True:
                try:
                    if (await client.get("/health")).is_success:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.05)
            yield child, client
        finally:
            if child.returncode is None:
                child.kill()
            await child.communicate()


@on_loop
async def test_running_streams_finish_and_new_requests_are_refused(tmp_path: Path) -> None:
    """SIGTERM during a stream: the stream ends whole, nothing new gets in, the exit code is 0."""
    release = asyncio.Event()
    async with (
        upstream(held(release, CHUNK)) as fake,
        process(fake, tmp_path, "{drain_s: 10}") as (child, client),
    ):
        stream = asyncio.create_task(client.post("/v1/chat/completions", json=STREAMED))
        await until(lambda: fake.running == 1)
        child.send_signal(signal.SIGTERM)
        while True:  # until the signal is handled: refused, or told that it drains
            try:
                response = await client.get("/health")
            except httpx.TransportError:
                break
            if response.status_code == 503:
                assert response.json()["status"] == "draining"
        with pytest.raises(httpx.TransportError):
            while True:
                refused = await client.post("/v1/chat/completions", json=HELLO)
                assert refused.json()["error"]["code"] == "draining"
        release.set()
        assert (await stream).content == CHUNK + DONE
        assert await child.wait() == 0


@on_loop
async def test_a_stream_that_outlives_the_drain_is_told(tmp_path: Path) -> None:
    """After drain_s the client gets an error event and the terminator; the process ends with 0."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(CHUNK)
        await asyncio.Event().wait()

    async with (
        upstream(answer) as fake,
        process(fake, tmp_path, "{drain_s: 0.2}") as (child, client),
    ):
        async with client.stream("POST", "/v1/chat/completions", json=STREAMED) as stream:
            chunks = stream.aiter_raw()
            body = await anext(chunks)
            idle = socket.create_connection(("127.0.0.1", client.base_url.port))
            child.send_signal(signal.SIGTERM)
            async for chunk in chunks:
                body += chunk
            idle.close()
        assert b'"code":"gateway_stopped"' in body
        assert body.endswith(b"\n\n" + DONE)
        assert await child.wait() == 0


@on_loop
async def test_the_process_says_what_is_wrong_with_its_policy(tmp_path: Path) -> None:
    """No traceback: a line, and exit code 2."""
    policy = tmp_path / "policy.yaml"
    url = "{url: 'http://x', api_key_env: NO_SUCH_KEY}"
    texts = {"": "version: 2\n", "NO_SUCH_KEY": f"version: 1\nupstreams: [{url}]\n"}
    environ = {name: value for name, value in os.environ.items() if name != "NO_SUCH_KEY"}
    for word, text in texts.items():
        policy.write_text(text)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", str(policy), cwd=ROOT, env=environ,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, said = await child.communicate()
        assert child.returncode == 2
        assert word in said.decode()
        assert "Traceback" not in said.decode()
