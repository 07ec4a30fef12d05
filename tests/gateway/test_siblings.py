"""Several gateway processes keep traces and receipts, and any of them finds what another has."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.edge import Live, build
from gateway.replica import Replica
from gateway.siblings import NotPrivate, Siblings
from gateway.state import in_memory
from policies.admin import Admin
from policies.schema import Deployment, Gateway, Runtime, Tenant
from policies.slo import key_hash
from tests.gateway.scripted import ASKED, Engine
from tests.gateway.world import HELLO, Fake, Front, listening, on_loop, until, upstream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of this user alone, and short enough a path for sockets."""
    private = tmp_path / "s"
    private.mkdir(mode=0o700)
    return private


@asynccontextmanager
async def one_of(count: int, folder: Path | None, name: str, fake: Fake, **more: Any) -> Any:
    """One of so many gateway processes, as far as it knows."""
    settings = Gateway(processes=count, **more)
    deployment = Deployment(version=1, gateway=settings, runtime=Runtime())
    siblings = Siblings(folder, name) if folder is not None else None
    state = replace(in_memory(settings), siblings=siblings)
    live = Live(build(deployment, [Replica(fake.url, own=True)], state=state))
    async with listening(live) as front:
        await until(lambda: front.pool.replicas[0].healthy)
        yield front


@asynccontextmanager
async def two(folder: Path, fake: Fake, **more: Any) -> AsyncIterator[tuple[Front, Front]]:
    async with (
        one_of(2, folder, "1", fake, **more) as one,
        one_of(2, folder, "2", fake, **more) as other,
    ):
        yield one, other


async def ended(front: Front, count: int) -> None:
    await until(lambda: len(front.live.edge.tracer.ring) == count)


async def get(front: Front, path: str, status: int = 200, key: str = "") -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = await front.client.get(path, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


@asynccontextmanager
async def silent(path: Path) -> AsyncIterator[list[str]]:
    """A process that hangs, and what it was asked."""
    asked: list[str] = []

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(json.loads(await reader.readline())["what"])
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(hang, path)
    try:
        yield asked
    finally:
        server.close()
        path.unlink()  # noqa: ASYNC240  # of this test alone


@on_loop
async def test_what_one_process_keeps_the_other_tells(folder: Path) -> None:
    """A trace by any of its names, a receipt for its tenant's eyes and for the console's."""
    async with upstream() as fake, two(folder, fake) as (one, other):
        answer = await one.post(HELLO)
        await ended(one, 1)
        assert len(other.live.edge.tracer.ring) == 0
        request, receipt = (answer.headers[n] for n in ("x-request-id", "x-headgate-receipt"))
        for front in (one, other):
            for name in (request, receipt):
                trace = await get(front, f"/admin/traces/{name}")
                assert (trace["request_id"], trace["receipt"]) == (request, receipt)
            for path in ("/v1/receipts", "/admin/receipts"):
                assert (await get(front, f"{path}/{receipt}"))["id"] == receipt


@on_loop
async def test_lists_are_of_all_processes(folder: Path) -> None:
    """In one order; never more than were asked for."""
    async with upstream() as fake, two(folder, fake) as (one, other):
        names = []
        for at in range(4):
            answer = await (one, other)[at % 2].post(HELLO)
            names.append(answer.headers["x-headgate-receipt"])
        for front in (one, other):
            await ended(front, 2)
        for front in (one, other):
            told = await get(front, "/admin/traces")
            assert [trace["receipt"] for trace in told["traces"]] == names[::-1]
            assert told["processes"] == {"asked": 2, "of": 2}
            slow = (await get(front, "/admin/traces?slow=1&limit=3"))["traces"]
            took = sorted((trace["e2e_s"] for trace in told["traces"]), reverse=True)
            assert [trace["e2e_s"] for trace in slow] == took[:3]
            receipts = await get(front, "/v1/receipts")
            assert [one["id"] for one in receipts["data"]] == names


@on_loop
async def test_a_tenant_reads_its_own_receipts_from_any_process_and_nobody_elses(
    folder: Path,
) -> None:
    tenants = {name: Tenant(keys=(key_hash(name),)) for name in ("mine", "theirs")}
    async with upstream() as fake, two(folder, fake, tenants=tenants) as (one, other):
        answer = await one.post(HELLO, headers={"authorization": "Bearer mine"})
        name = answer.headers["x-headgate-receipt"]
        assert (await get(other, f"/v1/receipts/{name}", key="mine"))["tenant"] == "mine"
        await get(other, f"/v1/receipts/{name}", 404, key="theirs")
        await get(other, f"/v1/receipts/{name}", 401)
        assert (await get(other, "/v1/receipts", key="theirs"))["data"] == []


@on_loop
async def test_a_receipt_is_found_by_every_id_that_its_request_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: a trace was, and its receipt by its own alone. By whoever may read it: its tenant,
    and the operator, who reads those of all tenants."""
    monkeypatch.setenv("STEER", "steering")
    tenants = {name: Tenant(keys=(key_hash(name),)) for name in ("mine", "theirs")}
    more: dict[str, Any] = {"tenants": tenants, "admin": Admin(key_env="STEER")}
    async with upstream(Engine("one")) as fake, two(folder, fake, **more) as (one, other):
        names = []
        for tenant in tenants:
            answer = await one.post(ASKED, headers={"authorization": f"Bearer {tenant}"})
            names.append(answer.headers["x-headgate-receipt"])
        await ended(one, 2)
        name = answer.headers["x-request-id"]
        trace = await get(one, f"/admin/traces/{name}", key="steering")
        for known in (name, trace["trace_id"], trace["answer_id"]):
            assert (await get(other, f"/v1/receipts/{known}", key="theirs"))["id"] == names[1]
            assert (await get(other, f"/admin/receipts/{known}", key="steering"))["id"] == names[1]
        await get(other, f"/v1/receipts/{name}", 404, key="mine")
        every = await get(other, "/admin/receipts", key="steering")
        assert [one["id"] for one in every["data"]] == names
        await get(other, "/admin/receipts", 401, key="mine")


@on_loop
async def test_others_go_on_while_all_receipts_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: of 2,048 receipts with 16 replicas each no stream went on for two seconds. They are
    told a few at a time, and say what each alone says."""
    async with upstream() as fake, two(folder, fake) as (one, other):
        receipts = one.live.edge.routing.receipts
        answer = await one.post(HELLO)
        first = receipts.get(answer.headers["x-headgate-receipt"])
        assert first is not None
        for at in range(300):
            receipts.keep(replace(first, id=f"rcpt_{at}", at=first.at + 1 + at))
        turns, waiting = 0, True
        monkeypatch.setattr("gateway.pause.PIECE_S", 0.0)

        async def others() -> None:
            nonlocal turns
            while waiting:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        own, asked = [await get(front, "/v1/receipts") for front in (one, other)]
        waiting = False
        await task
        assert turns > 2 * 301  # between two receipts, of each answer
        assert own["data"] == asked["data"]
        same = receipts.get("rcpt_6")
        assert same is not None
        assert own["data"][7] == orjson.loads(orjson.dumps(same.payload()))
        assert len(own["data"]) == 301


@on_loop
async def test_who_finds_nothing_is_told_where_was_looked(folder: Path) -> None:
    """In all processes; in those that answered; in this one, which cannot ask the others."""
    async with upstream() as fake:
        async with two(folder, fake) as (one, _):
            for path in ("/admin/traces/none", "/v1/receipts/none", "/admin/receipts/none"):
                error = (await get(one, path, 404))["error"]
                assert "each of the 2 gateway processes keeps" in error["message"]
        dead = socket.socket(socket.AF_UNIX)  # of one that was killed: nobody listens
        dead.bind(str(folder / "9.sock"))
        dead.close()
        async with one_of(3, folder, "1", fake) as one, one_of(3, folder, "2", fake):
            error = (await get(one, "/admin/traces/none", 404))["error"]
            assert "each of 2 of 3 gateway processes, which answered, keeps" in error["message"]
        async with one_of(2, None, "", fake) as one:
            error = (await get(one, "/admin/traces/none", 404))["error"]
            assert "this one of 2 gateway processes, which cannot ask" in error["message"]
            assert (await get(one, "/admin/traces"))["processes"] == {"asked": 1, "of": 2}
        async with one_of(1, None, "", fake) as one:
            error = (await get(one, "/admin/traces/none", 404))["error"]
            assert "this gateway keeps its latest 256" in error["message"]


@on_loop
async def test_a_list_in_the_terminal_says_which_processes_it_is_of(folder: Path) -> None:
    """Where it is of all, nothing has to be said."""
    async with upstream() as fake:
        async with two(folder, fake) as (one, _):
            assert await headgate("trace", "latest", "--url", one.url) == (0, "")
        async with one_of(2, None, "", fake) as one:
            code, said = await headgate("trace", "latest", "--url", one.url)
    assert (code, said.split(";")[0]) == (0, "of 1 of 2 gateway processes")


async def headgate(*arguments: str) -> tuple[int | None, str]:
    """Its exit code, and what it says beside what was asked for."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "headgate", *arguments, stdout=pipe, stderr=pipe
    )
    _, said = await process.communicate()
    return process.returncode, said.decode()


@on_loop
async def test_the_console_knows_how_many_processes_there_are(folder: Path) -> None:
    async with upstream() as fake, two(folder, fake) as (one, _):
        assert (await get(one, "/admin/overview"))["process"]["of"] == 2


@on_loop
async def test_health_says_which_process_it_is_of_and_how_the_others_are(folder: Path) -> None:
    """It told of one of them, now this, now that; one that hangs delays it by a quarter of a
    second, once a second, and one that is away or drains is seen to."""
    async with upstream() as fake:
        async with one_of(3, folder, "0", fake) as one, one_of(3, folder, "1", fake) as other:
            for name, front in (("0", one), ("1", other)):
                health = await get(front, "/health")
                assert (health["status"], health["process"]) == ("ready", name)
                assert health["processes"] == {
                    "answering": 2, "of": 3, "status": {"0": "ready", "1": "ready", "2": None}
                }  # fmt: skip
        async with silent(folder / "1.sock"), one_of(2, folder, "0", fake) as one:
            health = await get(one, "/health")
            assert health["processes"] == {
                "answering": 1, "of": 2, "status": {"0": "ready", "1": None}
            }  # fmt: skip
        async with two(folder, fake) as (one, other):
            other.pool.draining = True
            assert (await get(one, "/health"))["processes"]["status"] == {
                "0": None, "1": "ready", "2": "draining"
            }  # fmt: skip
        async with one_of(1, None, "", fake) as one:
            assert not {"process", "processes"} & (await get(one, "/health")).keys()


@on_loop
async def test_strangers_get_no_process_asked(folder: Path) -> None:
    """Whoever has no key hears whether this process is ready, from itself."""
    tenants = {"mine": Tenant(keys=(key_hash("mine"),))}
    async with (
        silent(folder / "1.sock") as asked,
        upstream() as fake,
        one_of(2, folder, "0", fake, tenants=tenants) as one,
    ):
        for _ in range(3):
            assert (await get(one, "/health")).keys() == {"status", "replicas"}
        assert "health" not in asked
        await get(one, "/health", key="mine")
        assert "health" in asked


@on_loop
async def test_nonsense_on_the_socket_is_not_answered(folder: Path) -> None:
    """And what is answered next is the same as before."""
    async with upstream() as fake, two(folder, fake) as (one, other):
        for words in (b"", b"\n", b"{\n", b"\xff" * 2**21, b'{"what": "else"}\n', b"[]\n"):
            reader, writer = await asyncio.open_unix_connection(folder / "1.sock")
            writer.write(words)
            writer.write_eof()
            with suppress(ConnectionError):  # closed before it has read all of it
                assert await reader.read() == b""
            writer.close()
        answer = await one.post(HELLO)
        await ended(one, 1)
        await get(other, f"/admin/traces/{answer.headers['x-request-id']}")


@on_loop
async def test_one_that_cannot_listen_serves_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Paths of sockets are short; a temporary folder may lie deep."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir(mode=0o700)
    async with upstream() as fake, one_of(2, deep, "1", fake) as front:
        assert (await front.post(HELLO)).status_code == 200
    (said,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert "cannot ask this one" in said


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    """Whoever could listen there would be asked, and could lie."""
    tmp_path.chmod(0o755)
    with pytest.raises(NotPrivate, match="chmod 700"):
        Siblings(tmp_path, "1")
