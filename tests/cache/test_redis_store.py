"""What only Redis can do to its store: be away, be silent, forget scripts, ask for a password."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cache.redis_lane import WAITING_MAX
from cache.redis_store import RedisStore
from cache.store import Bucket, StoreDown, Want, key
from tests.redis_server import needs_redis, redis_server

pytestmark = needs_redis
A = key("limit", "a")
RULE = Bucket(1000, per_s=1)


def test_a_redis_that_is_killed_and_comes_back_is_found_again() -> None:
    """Each call answers or fails soon; nothing has to be done for it to work again."""

    async def run() -> None:
        store = RedisStore(server.url, timeout_s=5)
        assert (await store.take([Want(A, RULE, 10)])).allowed
        server.kill()
        for _ in range(2):
            with pytest.raises(StoreDown, match="Redis: "):
                await store.take([Want(A, RULE, 10)])
        server.start()
        taken = await store.take([Want(A, RULE, 10)])
        assert taken.left[0] == 990  # without persistence it has forgotten
        await store.aclose()

    with redis_server() as server:
        asyncio.run(run())


def test_a_silent_redis_fails_in_time_and_all_that_wait_with_it() -> None:
    """Stopped, it keeps its connections; when it goes on, no answer meets a later question."""

    async def run() -> None:
        store = RedisStore(server.url, timeout_s=0.2)
        await store.put(A, b"kept", 60)
        server.pause()
        begun = time.monotonic()
        calls = [store.count(key("count"), 1, 60) for _ in range(500)]
        said = await asyncio.gather(*calls, return_exceptions=True)
        assert time.monotonic() - begun < 5
        assert all(isinstance(one, StoreDown) for one in said)
        server.resume()
        store._lane._timeout_s = 10
        assert await store.get(A) == b"kept"
        assert await store.get(key("other")) is None
        await store.aclose()

    with redis_server() as server:
        asyncio.run(run())


def test_calls_that_come_together_travel_together_and_each_gets_its_answer() -> None:
    async def run() -> None:
        store = RedisStore(server.url, timeout_s=10)
        names = [key("value", f"{number}") for number in range(600)]
        await asyncio.gather(*(store.put(name, name.encode(), 60) for name in names))
        assert await asyncio.gather(*(store.get(name) for name in names)) == [
            name.encode() for name in names
        ]
        given_up = [asyncio.create_task(store.get(name)) for name in names[:300]]
        await asyncio.sleep(0)
        for task in given_up[::2]:
            task.cancel()
        assert await store.get(names[7]) == names[7].encode()
        said = await asyncio.gather(*given_up, return_exceptions=True)
        assert said[1::2] == [name.encode() for name in names[1:300:2]]
        await store.aclose()

    with redis_server() as server:
        asyncio.run(run())


def test_a_redis_that_has_forgotten_its_scripts_is_told_them_again() -> None:
    async def run() -> None:
        store = RedisStore(server.url, timeout_s=10)
        for left in (999, 998):
            assert (await store.take([Want(A, RULE)])).left == pytest.approx((left,), abs=0.5)
            assert await store._lane.ask("SCRIPT", "FLUSH") == b"OK"
        await store.aclose()

    with redis_server() as server:
        asyncio.run(run())


def test_what_redis_refuses_is_no_answer() -> None:
    """Out of memory, read-only, another kind of value: the store is down, and says why."""

    async def run() -> None:
        store = RedisStore(server.url, timeout_s=10)
        await store.put(A, b"a value", 60)
        with pytest.raises(StoreDown, match="WRONGTYPE"):
            await store.notes(A)
        assert await store.get(A) == b"a value"
        await store.aclose()

    with redis_server() as server:
        asyncio.run(run())


def test_namespaces_and_names_stay_apart() -> None:
    async def run() -> None:
        one = RedisStore(server.url, namespace="one", timeout_s=10)
        two = RedisStore(server.url, namespace="two", timeout_s=10)
        await one.put(key("cut", "tenant secret"), b"1", 60)
        assert await two.get(key("cut", "tenant secret")) is None
        names = await one._lane.ask("KEYS", "*")
        assert len(names) == 1
        assert names[0].startswith(b"{one}:cut:")
        assert b"secret" not in names[0]
        await one.aclose()
        await two.aclose()

    with redis_server() as server:
        asyncio.run(run())


def test_a_password_is_given_and_a_wrong_one_is_told() -> None:
    async def run() -> None:
        store = RedisStore(server.url, password="right", timeout_s=10)
        await store.put(A, b"1", 60)
        assert await store.get(A) == b"1"
        await store.aclose()
        wrong = RedisStore(server.url, password="wrong", timeout_s=10)
        with pytest.raises(StoreDown, match="password"):
            await wrong.get(A)
        await wrong.aclose()

    with redis_server("--requirepass", "right") as server:
        asyncio.run(run())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_tls_is_checked_against_the_given_authority(tmp_path: Path) -> None:
    """`rediss://` with our own authority works; without it the server is not trusted."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    cert = str(tmp_path / "cert.pem")
    tls = ["--tls-cert-file", cert, "--tls-key-file", str(tmp_path / "key.pem")]

    async def run() -> None:
        url = f"rediss://127.0.0.1:{server.port}/0"
        store = RedisStore(url, ca_file=cert, timeout_s=10)
        await store.put(A, b"1", 60)
        assert await store.get(A) == b"1"
        await store.aclose()
        stranger = RedisStore(url, timeout_s=10)
        with pytest.raises(StoreDown, match="certificate"):
            await stranger.get(A)
        await stranger.aclose()

    with redis_server(
        *tls, "--tls-auth-clients", "no", "--tls-ca-cert-file", cert, tls=True
    ) as server:
        asyncio.run(run())


def test_what_is_no_redis_is_told_and_too_much_at_once_is_refused() -> None:
    """Another server at the port; and a store that answers nobody does not gather questions."""

    async def chat(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(chat, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        store = RedisStore(f"redis://127.0.0.1:{port}", timeout_s=10)
        with pytest.raises(StoreDown, match="Redis: "):
            await store.get(A)
        server.close()
        await store.aclose()

    async def flood(url: str) -> None:
        store = RedisStore(url, timeout_s=10)
        await store.get(A)
        asked = [asyncio.create_task(store.get(A)) for _ in range(WAITING_MAX + 100)]
        said = await asyncio.gather(*asked, return_exceptions=True)
        refused = [one for one in said if isinstance(one, StoreDown)]
        assert len(refused) == 100
        assert "wait for it already" in str(refused[0])
        assert await store.get(A) is None
        await store.aclose()

    asyncio.run(run())
    with redis_server() as server:
        asyncio.run(flood(server.url))


def test_what_others_put_there_is_nothing_of_ours() -> None:
    """The bug: a value shorter than its date ended the task that follows drains, for good."""

    async def run() -> None:
        store = RedisStore(server.url, timeout_s=5)
        value, board = key("drains"), key("board")
        for short in (b"", b"x", b"1234567"):
            for name in (value, key("count"), A):
                await store._ask("SET", "{headgate}:" + name, short)
            await store._ask("HSET", "{headgate}:" + board, "somebody", short)
            assert await store.get(value) is None
            assert await store.swap(value, None, b"ours", 60)
            assert await store.get(value) == b"ours"
            assert await store.count(key("count"), 2, 60) == 2
            assert (await store.take([Want(A, RULE)])).allowed
            assert await store.notes(board) == {}
        await store.aclose()

    with redis_server() as server:
        asyncio.run(run())
