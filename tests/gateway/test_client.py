"""The client to replicas against servers of every manner, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from gateway.client import Client, Origin, Unreachable, head_of
from gateway.connection import FRAMING_MAX_BYTES
from gateway.response import BUFFER_MAX_BYTES, Cut, Failed, Response, Stale
from tests.gateway.world import on_loop, refused_port, until

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Line:
    """One connection at a server that says whatever a test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> tuple[bytes, bytes]:
        """Head and body of the next request."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            if line.startswith(b"content-length: "):
                length = int(line[16:])
        return head, await self.reader.readexactly(length)

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


@asynccontextmanager
async def served(
    talk: Callable[[Line], Awaitable[None]],
    *,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[str, list[Line]]]:
    """A server whose connections are `talk`; its URL, and the connections that it got."""
    lines: list[Line] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(Line(reader, writer))
        try:
            await talk(lines[-1])
        except (ConnectionError, asyncio.IncompleteReadError, RuntimeError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, host, 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    named = f"[{host}]" if ":" in host else host
    try:
        yield f"{'https' if tls else 'http'}://{named}:{port}", lines
    finally:
        server.close()


@asynccontextmanager
async def client(**more: object) -> AsyncIterator[Client]:
    one = Client(2.0, **more)  # type: ignore[arg-type]
    try:
        yield one
    finally:
        await one.close()


async def whole(response: Response) -> bytes:
    body = b""
    while piece := await response.readany():
        body += piece
    return body


async def ask(one: Client, url: str, body: bytes = b"{}") -> bytes:
    return await whole(await one.send("POST", url, "/x", {}, body))


def always(*answers: bytes) -> Callable[[Line], Awaitable[None]]:
    """Says these, one for each request, then closes."""

    async def talk(line: Line) -> None:
        for answer in answers:
            await line.request()
            await line.say(answer)

    return talk


# ---- answers as they may be ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK, b"ok"),
        (CHUNKED + b"1\r\na\r\n3;note=1\r\nbcd\r\n0\r\nx-trailer: 1\r\n\r\n", b"abcd"),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"to the end"),
        (b"HTTP/1.0 200 OK\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nxyz", b"xyz"),
    ],
)
@on_loop
async def test_every_framing_of_a_body_is_read_to_its_end(answer: bytes, body: bytes) -> None:
    """Length, chunks, the end of the connection; informational answers before it are passed by."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.say(answer)
        line.writer.write_eof()
        await line.reader.read()

    async with served(talk) as (url, _), client() as one:
        response = await one.send("POST", url, "/x", {"x-a": "1"}, b"{}")
        assert await whole(response) == body
        assert response.at_eof()
        assert b"link" not in dict(response.raw_headers)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_an_answer_reads_the_same_however_it_is_split(data: st.DataObject) -> None:
    """Any split into segments, and any chunk sizes, give the same bytes, read or flowing."""
    body = data.draw(st.binary(max_size=200))
    at = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=5)))
    pieces = [body[a:b] for a, b in zip([0, *at], [*at, len(body)], strict=True)]
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece]
    raw = b"".join((CHUNKED, *chunks, b"0\r\n\r\n"))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    flows = data.draw(st.booleans())

    async def talk(line: Line) -> None:
        await line.request()
        for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            await line.say(raw[start:stop])
            await asyncio.sleep(0)
        await line.reader.read()

    async def look() -> None:
        async with served(talk) as (url, _), client() as one:
            response = await one.send("POST", url, "/x", {}, b"{}")
            got: list[bytes] = []
            if flows:
                await response.flow(lambda piece: bool(got.append(piece)))
            else:
                got.append(await whole(response))
            assert b"".join(got) == body
            assert response.complete

    on_loop(look)()


@on_loop
async def test_a_request_says_what_was_given_and_nothing_else() -> None:
    """Path below the base, its host, the headers, the exact length."""
    heads: list[bytes] = []

    async def talk(line: Line) -> None:
        while True:
            head, body = await line.request()
            heads.append(head + body)
            await line.say(OK)

    async with served(talk) as (url, lines), client() as one:
        host = url.removeprefix("http://").encode()
        await whole(await one.send("POST", f"{url}/base/", "/v1/x", {"x-a": "1"}, b"{}"))
        await whole(await one.send("GET", url, "/health", {}))
        expected = b"POST /base/v1/x HTTP/1.1\r\nhost: %s\r\nx-a: 1\r\ncontent-length: 2\r\n\r\n{}"
        assert heads[0] == expected % host
        assert heads[1] == b"GET /health HTTP/1.1\r\nhost: %s\r\n\r\n" % host
        assert len(lines) == 2, "connections of two base URLs are not mixed"


def test_a_line_end_in_a_header_is_refused() -> None:
    """A key with a line end would otherwise add headers of its own."""
    origin = Origin("http://h:1", None)
    for value in ("a\r\nx: y", "a\ny", "a\rb"):
        with pytest.raises(ValueError, match="line end"):
            head_of("POST", origin, "/", {"authorization": value}, 0)


# ---- connections kept, and found closed ----------------------------------------------------------


@on_loop
async def test_a_connection_serves_again_and_the_freshest_is_taken_first() -> None:
    """One after the other needs one connection; at once needs as many as there are requests."""
    async with served(always(*[OK] * 10)) as (url, lines), client() as one:
        for _ in range(3):
            await ask(one, url)
        assert len(lines) == 1
        await asyncio.gather(ask(one, url), ask(one, url))
        assert len(lines) == 2


@on_loop
async def test_a_connection_that_was_closed_meanwhile_is_never_used() -> None:
    """Even where the loop has not come to its end yet: the kernel is asked."""
    async with served(always(OK)) as (url, lines), client() as one:
        for expected in range(1, 6):
            await ask(one, url)
            closing = lines[-1].writer.transport.is_closing
            while not closing():  # noqa: ASYNC110  # as few turns of the loop as can be
                await asyncio.sleep(0)
            assert len(lines) == expected


@on_loop
async def test_an_idle_connection_grows_old_and_is_closed() -> None:
    """After keep_alive_s nothing of it is left, nor of its origin."""
    gone = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.request()
        await line.say(OK)
        assert await line.reader.read() == b""
        gone.set()

    async with served(talk) as (url, _), client(keep_alive_s=0.05) as one:
        await ask(one, url)
        await gone.wait()
        await until(lambda: not one._connections and not one._origins)


@on_loop
async def test_a_kept_connection_that_closes_under_a_request_is_stale() -> None:
    """No byte of an answer came: the request may be sent again. On a fresh one it has failed."""

    async def talk(line: Line) -> None:
        await line.request()
        if len(lines) == 1:
            await line.say(OK)
            await line.request()

    async with served(talk) as (url, lines), client() as one:
        await ask(one, url)
        with pytest.raises(Stale):
            await ask(one, url)
        with pytest.raises(Failed):
            await ask(one, url)


@pytest.mark.parametrize("byte", [b"H", b"HTTP/1.1 200 OK\r\ncontent-"])
@on_loop
async def test_a_kept_connection_that_began_to_answer_is_not_stale(byte: bytes) -> None:
    """The replica has the request: sending it again could do the work twice."""
    async with served(always(OK, byte)) as (url, _), client() as one:
        await ask(one, url)
        with pytest.raises(Failed):
            await ask(one, url)


@on_loop
async def test_a_kept_connection_that_closes_late_has_failed(monkeypatch) -> None:
    """Idle connections are closed within a round trip; who dies later died of something else."""
    monkeypatch.setattr("gateway.connection.RACE_S", 0.02)

    async def talk(line: Line) -> None:
        await line.request()
        await line.say(OK)
        await line.request()
        await asyncio.sleep(0.05)

    async with served(talk) as (url, _), client() as one:
        await ask(one, url)
        with pytest.raises(Failed):
            await ask(one, url)


SMUGGLED = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong"


@pytest.mark.parametrize("late", [False, True], ids=["with it", "later"])
@on_loop
async def test_a_second_answer_to_one_request_reaches_nobody(late: bool) -> None:
    """What follows an answer unasked is no answer to the next request."""

    async def talk(line: Line) -> None:
        while True:
            await line.request()
            await line.say(OK if late else OK + SMUGGLED)
            if late:
                await asyncio.sleep(0.01)
                await line.say(SMUGGLED)

    async with served(talk) as (url, lines), client() as one:
        for expected in range(1, 4):
            assert await ask(one, url) == b"ok"
            if late:
                await until(lambda: not one._connections)
            assert len(lines) == expected


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200",
    ],
)
@on_loop
async def test_a_connection_that_is_to_close_is_not_kept(answer: bytes) -> None:
    """By the server's word, or by its version."""
    async with served(always(answer, OK)) as (url, lines), client() as one:
        assert await ask(one, url) == b"ok"
        assert await ask(one, url) == b"ok"
        assert len(lines) == 2


# ---- hostile and broken servers ------------------------------------------------------------------


async def pour(line: Line, start: bytes, piece: bytes) -> None:
    await line.request()
    await line.say(start)
    while not line.reader.at_eof():
        await line.say(piece)


@pytest.mark.parametrize(
    ("start", "piece", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x-a: b\r\n" * 100, "headers or framing"),
        (b"HTTP/1.1 200 OK\r\nx: ", b"a" * 1000, "headers or framing"),
        (b"HTTP/1.1 200 ", b"a" * 1000, "headers or framing"),
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n", "informational"),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", b"", "protocol"),
        (b"SSH-2.0-x\r\n", b"", "no HTTP"),
        (b"HTTP/2.0 200 OK\r\n\r\n", b"", "no HTTP"),
        (b"HTTP/1.1 600 X\r\ncontent-length: 0\r\n\r\n", b"", "status is 600"),
        (b"HTTP/1.1 999 X\r\ncontent-length: 0\r\n\r\n", b"", "status is 999"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", b"", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", b"", "no HTTP"),
        (CHUNKED[:-2] + b"content-length: 3\r\n\r\n", b"", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\na\x00b: c\r\n\r\n", b"", "no HTTP"),
    ],
)
@on_loop
async def test_what_is_no_proper_head_fails(start: bytes, piece: bytes, reason: str) -> None:
    """Endless, many, other protocols, lengths that contradict: failed, closed, and bounded."""

    async def talk(line: Line) -> None:
        if piece:
            await pour(line, start, piece)
        await line.request()
        await line.say(start)
        await line.reader.read()

    async with served(talk) as (url, lines), client() as one:
        with pytest.raises(Failed, match=reason):
            await ask(one, url)
        await until(lambda: lines[0].writer.transport.is_closing())


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"x\r\n", b""),
        (b"-1\r\n", b""),
        (b"fffffffffffffffff\r\n", b""),
        (b"2\r\nabc\r\n", b""),
        (b"1", b"0" * 100),
        (b"1;", b"x" * 1000),
        (b"0\r\nx: ", b"x" * 1000),
        (b"0\r\n", b"x: y\r\n" * 100),
    ],
)
@on_loop
async def test_broken_or_endless_framing_cuts_the_answer(start: bytes, piece: bytes) -> None:
    """What came before is given; the rest is a cut, whatever memory the server wanted to fill."""

    async def talk(line: Line) -> None:
        begun = CHUNKED + b"2\r\nok\r\n" + start
        if piece:
            await pour(line, begun, piece)
        await line.request()
        await line.say(begun)
        await line.reader.read()

    async with served(talk) as (url, lines), client() as one:
        response = await one.send("POST", url, "/x", {}, b"{}")
        got = b""
        with pytest.raises(Cut):
            while piece := await response.readany():
                got += piece
        assert got[:2] == b"ok"
        assert len(got) <= 4
        await until(lambda: lines[0].writer.transport.is_closing())
    assert FRAMING_MAX_BYTES <= 2**16


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize(
    "begun", [CHUNKED + b"5\r\nab", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab"]
)
@on_loop
async def test_an_early_end_is_a_cut_and_what_came_is_given(begun: bytes, end: str) -> None:
    """Neither by reading nor flowing is it taken for the end."""
    go = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.request()
        await line.say(begun)
        await go.wait()
        if end == "reset":
            sock = line.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        line.writer.transport.abort()

    async with served(talk) as (url, _), client() as one:
        for flows in (False, True):
            go.clear()
            response = await one.send("POST", url, "/x", {}, b"{}")
            assert await response.readany() == b"ab"
            go.set()
            with pytest.raises(Cut):
                await (response.flow(lambda _: False) if flows else response.readany())
            assert not response.complete


@on_loop
async def test_nothing_listens_or_answers_or_resolves() -> None:
    """Unreachable: nothing was sent. A server that accepts nothing is waited for only so long."""
    async with client() as one:
        for url in (refused_port(), "http://no-such-host.invalid"):
            with pytest.raises(Unreachable, match="cannot connect"):
                await ask(one, url)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        one = Client(0.1)
        with pytest.raises(Unreachable, match=r"within 0\.1 s"):
            await ask(one, f"http://127.0.0.1:{address[1]}")
        await one.close()
        for filler in fillers:
            filler.close()


# ---- large bodies, slow readers ------------------------------------------------------------------


@on_loop
async def test_a_large_body_arrives_whole_and_waits_for_a_slow_server() -> None:
    """Not more than the sockets hold is written ahead of who reads."""
    body = bytes(range(256)) * 2**15  # 8 MiB
    go = asyncio.Event()
    got: list[bytes] = []

    async def talk(line: Line) -> None:
        line.writer.transport.pause_reading()
        await go.wait()
        line.writer.transport.resume_reading()
        got.append((await line.request())[1])
        await line.say(OK)

    async with served(talk) as (url, _), client() as one:
        asking = asyncio.create_task(ask(one, url, body))
        await until(lambda: bool(one._connections))
        connection = next(iter(one._connections))
        await until(lambda: connection._blocked is not None)
        assert connection.transport.get_write_buffer_size() < len(body) / 4
        go.set()
        assert await asking == b"ok"
        assert got == [body]


@on_loop
async def test_an_answer_before_the_body_is_sent_is_an_answer() -> None:
    """A refusal in the middle of a large body arrives, and that connection is not used again."""

    async def talk(line: Line) -> None:
        await line.reader.readuntil(b"\r\n\r\n")
        await line.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await asyncio.Event().wait()

    async with served(talk) as (url, lines), client() as one:
        for expected in (1, 2):
            response = await one.send("POST", url, "/x", {}, bytes(32 * 2**20))
            assert (response.status, await whole(response)) == (413, b"no")
            assert len(lines) == expected


@on_loop
async def test_a_server_that_goes_inside_a_large_body_has_failed() -> None:
    """Nobody waits for a connection that cannot take the rest."""

    async def talk(line: Line) -> None:
        await line.reader.readuntil(b"\r\n\r\n")

    async with served(talk) as (url, _), client() as one:
        with pytest.raises(Failed):
            await ask(one, url, bytes(32 * 2**20))


@pytest.mark.parametrize("flows", [False, True])
@on_loop
async def test_a_server_is_not_read_faster_than_its_answer_is(flows: bool) -> None:
    """Whoever does not read, or pauses the flow, holds the server back; then all arrives."""
    size = 16 * 2**20
    sent = 0

    async def talk(line: Line) -> None:
        nonlocal sent
        await line.request()
        await line.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            await line.say(bytes(2**16))
            sent += 2**16
        await line.reader.read()

    async with served(talk) as (url, _), client() as one:
        response = await one.send("POST", url, "/x", {}, b"{}")
        got = 0

        def sink(piece: bytes) -> bool:
            nonlocal got
            if not got:
                response.pause()
            got += len(piece)
            return False

        flow = asyncio.create_task(response.flow(sink)) if flows else None
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < size - BUFFER_MAX_BYTES
        if flow is not None:
            response.resume()
            await flow
            assert got == size
        else:
            assert len(await whole(response)) == size


@on_loop
async def test_leaving_closes_at_once_and_only_what_is_under_way() -> None:
    """close() in the middle is seen by the server; after the end it keeps the connection."""
    left = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.request()
        await line.say(OK)
        await line.request()
        await line.say(CHUNKED + b"1\r\na\r\n")
        assert await line.reader.read() == b""
        left.set()

    async with served(talk) as (url, lines), client() as one:
        response = await one.send("POST", url, "/x", {}, b"{}")
        await whole(response)
        response.close()
        response = await one.send("POST", url, "/x", {}, b"{}")
        assert len(lines) == 1
        response.close()
        response.close()
        await left.wait()


@on_loop
async def test_who_is_cancelled_while_connecting_or_waiting_leaves_nothing() -> None:
    """Neither an open connection nor a future that nobody asks for."""

    async def talk(line: Line) -> None:
        await line.reader.read()

    async with served(talk) as (url, lines), client() as one:
        for turns in range(6):
            asking = asyncio.create_task(ask(one, url))
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking])
            assert asking.cancelled()
        await until(lambda: not one._connections)
        await until(lambda: all(line.writer.transport.is_closing() for line in lines))


# ---- TLS and IPv6 --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost and its key in one file, signed by itself."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    line = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    command = [*line.split(), "-keyout", str(path), "-out", str(path.with_suffix(".crt"))]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no openssl that can sign a certificate")
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@on_loop
async def test_https_is_checked_and_kept_alive(certificate: Path) -> None:
    """A certificate that is trusted, for the name that was asked: else nothing is sent."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate.with_suffix(".crt")))
    async with served(always(OK, OK, OK), tls=serving) as (url, lines):
        named = url.replace("127.0.0.1", "localhost")
        async with client(tls=trusting) as one:
            assert [await ask(one, named) for _ in range(3)] == [b"ok"] * 3
            assert len(lines) == 1
            with pytest.raises(Unreachable, match="certificate"):
                await ask(one, url)
        async with client() as one:
            with pytest.raises(Unreachable, match="certificate"):
                await ask(one, named)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
@on_loop
async def test_an_ipv6_address_is_reached_and_named_in_brackets() -> None:
    """In the URL and in the Host header."""
    heads: list[bytes] = []

    async def talk(line: Line) -> None:
        heads.append((await line.request())[0])
        await line.say(OK)

    async with served(talk, host="::1") as (url, _), client() as one:
        assert await ask(one, url) == b"ok"
        assert b"\r\nhost: [::1]:" in heads[0]
