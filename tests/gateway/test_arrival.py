"""A request begins when its first byte comes to its socket, however late that is read."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import struct
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import uvloop
from hypothesis import given, strategies as st

from gateway.arrival import CLOCK_SET_S, Arrivals, Coming, Reader, moments, note_arrivals
from gateway.call import CHAT_PATH
from gateway.phases import phases
from gateway.spans import spans_of
from gateway.trail import Trail
from policies.schema import Tier
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Front,
    Peer,
    gateway,
    on_loop,
    until,
    upstream,
)

BODY = json.dumps(HELLO).encode()
HEAD = (
    f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(BODY)}\r\n\r\n"
)
ASKED = HEAD.encode() + BODY
BUSY_S = 0.03

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not note it here")


def busy(seconds: float = BUSY_S) -> None:
    """The loop, in whose thread this runs, does nothing else meanwhile."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        pass


class Client:
    """Asks from the loop's own thread, which is what keeps the loop from reading."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.sock = socket.create_connection(("127.0.0.1", front.port))
        self.sock.setblocking(False)

    def send(self, data: bytes) -> tuple[float, float]:
        """Between which moments it came to the gateway's socket."""
        before = time.monotonic()
        self.sock.sendall(data)
        return before, time.monotonic()

    async def answered(self, count: int) -> list[Trail]:
        """The trails so far, the latest last, once so many requests have ended."""
        ring = self._front.live.edge.tracer.ring
        await until(lambda: len(ring) == count)
        loop, got = asyncio.get_running_loop(), b""
        while not got.endswith(b"}"):
            got += await loop.sock_recv(self.sock, 2**16)
        return list(reversed(list(ring)))


def is_between(moment: float, sent: tuple[float, float]) -> bool:
    """To what the gateway lets two clocks differ by, which it reads one after the other."""
    return sent[0] - CLOCK_SET_S <= moment <= sent[1] + CLOCK_SET_S


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_request_that_waits_for_the_loop_begins_when_it_came(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """On a new connection, and on one that has served and has been idle; the wait is a phase."""

    async def run() -> None:
        async with upstream() as fake, gateway(fake) as front:
            client = Client(front)
            for count in (1, 2):
                sent = client.send(ASKED)
                busy()
                trail = (await client.answered(count))[-1]
                assert is_between(trail.began, sent)
                assert trail.read - trail.began >= BUSY_S - 0.001
                (lay,) = front.live.edge.meters.recv_queue_s.series.values()
                assert sum(lay.counts) == count
                assert lay.total >= count * (BUSY_S - 0.001)
                busy()  # idle: what came long ago is no wait of the next request
            client.sock.close()
            answer = await front.post(HELLO)
        assert "recv_queue;dur=" in answer.headers["server-timing"]

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


@on_loop
async def test_a_request_in_pieces_begins_with_its_first_and_waits_for_its_client() -> None:
    """What its client takes to send it is `upload`, and no lag of the loop; what a piece lies in
    the socket is."""
    async with upstream() as fake, gateway(fake) as front:
        client = Client(front)
        sent = client.send(ASKED[:20])
        least_s = most_s = 0.0  # that the gateway had nothing to read
        for piece in (ASKED[20:-5], ASKED[-5:]):
            unread = time.monotonic()
            await front.client.get("/health")  # what came before it has been read now
            read = time.monotonic()
            busy()
            came = client.send(piece)
            least_s += came[0] - read
            most_s += came[1] - unread
            busy()
        (trail,) = await client.answered(1)
        client.sock.close()
    assert is_between(trail.began, sent)
    assert is_between(trail.due - trail.began, (least_s, most_s))
    assert trail.read - trail.due >= 2 * BUSY_S - 2 * CLOCK_SET_S
    spent = phases(trail)
    assert spent["upload"] == trail.due - trail.began
    assert spent["recv_queue"] == trail.read - trail.due
    assert spent["gateway"] <= trail.ended - trail.read
    assert trail.read < trail.ended
    names = [span.name for span in spans_of(trail)]
    assert names[1:3] == ["gateway.upload", "gateway.recv_queue"]


@on_loop
async def test_a_pipelined_request_begins_when_the_answer_before_it_has_gone() -> None:
    """Whole, in pieces, or in a socket that is not read meanwhile: its client had an answer to get,
    and what it waits for that is neither the loop's nor the gateway's."""
    asked = []  # when the replica was

    async def answer(peer: Peer) -> None:
        asked.append(time.monotonic())
        await asyncio.sleep(BUSY_S)
        await peer.json({"choices": []})

    async with upstream(answer) as fake, gateway(fake) as front:
        client = Client(front)
        client.send(ASKED + ASKED + ASKED[:20])
        await until(lambda: len(fake.requests) == 1)
        client.send(ASKED[20:])
        trails = await client.answered(3)
        client.sock.close()
    for (one, after), at in zip(pairwise(trails), asked[1:], strict=True):
        assert one.ended <= after.began == after.due <= after.read <= at


@on_loop
async def test_what_a_client_takes_to_send_misses_no_target() -> None:
    """Nor is a trace kept for it: a slow upload is not the gateway's lateness. The bug: all of it
    was the phase `gateway`."""
    takes_s, target_s = 0.3, 0.5  # one of its two pieces, and a first token
    tiers = {"standard": Tier(ttft_ms=1000 * target_s)}
    body = json.dumps(STREAMED).encode()
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"

    async def answer(peer: Peer) -> None:
        await peer.stream(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', DONE)

    async with upstream(answer) as fake, gateway(fake, tiers=tiers) as front:
        client = Client(front)
        client.send(head.encode())
        for piece in (body[:9], body[9:]):
            await front.client.get("/health")
            busy(takes_s)
            client.send(piece)
        ring = front.live.edge.tracer.ring
        await until(lambda: len(ring) == 1)
        (trail,) = ring
        meters = front.live.edge.meters
        client.sock.close()
    assert trail.e2e_s > 2 * takes_s > target_s
    assert trail.ttft_s is not None
    assert trail.ttft_s < target_s
    assert trail.keep == ""
    assert dict(meters.goodput) == {("standard", "baseline", "true"): 1}


@on_loop
async def test_a_body_that_never_comes_whole_is_waited_for_to_its_end() -> None:
    """The answer says so: 408 after so long."""
    async with upstream() as fake, gateway(fake, body_timeout_s=0.1) as front:
        client = Client(front)
        client.send(ASKED[:-1])
        (trail,) = await client.answered(1)
        client.sock.close()
    assert trail.status == 408
    assert phases(trail)["upload"] >= 0.09


@given(
    steps=st.lists(st.tuples(st.floats(0, 9), st.one_of(st.none(), st.floats(-9, 9))), max_size=6),
    free=st.floats(0, 20),
)
def test_who_waited_for_whom_adds_up_whatever_the_notes_say(
    steps: list[tuple[float, float | None]], free: float
) -> None:
    """No part is negative, also where the kernel's notes are of another time, or there are none."""
    coming = Coming(5.0, 6.0)
    now = 6.0
    for after_s, noted_s in steps:
        now += after_s
        coming.more(0.0 if noted_s is None else max(0.0, now + noted_s), now)
        assert coming.read == now
    coming.no_sooner(free)
    slack_s = 1e-9
    assert coming.began - slack_s <= coming.due <= coming.read + slack_s
    assert coming.began >= free


@on_loop
async def test_what_is_refused_below_http_took_its_wait_too() -> None:
    async with upstream() as fake, gateway(fake) as front:
        client = Client(front)
        client.send(HEAD.encode().replace(b"content-length: ", b"content-length: x"))
        busy()
        await front.client.get("/health")
        loop, got = asyncio.get_running_loop(), b""
        while piece := await loop.sock_recv(client.sock, 2**16):
            got += piece
        client.sock.close()
    assert got.startswith(b"HTTP/1.1 400")
    (total,) = re.findall(rb"total;dur=([0-9.]+)", got)
    assert float(total) >= 1000 * (BUSY_S - 0.001)


def test_of_what_came_before_the_clock_was_set_and_is_read_after_nothing_is_known() -> None:
    """The kernel notes the wall clock's time: a wait of an hour, or one that has not begun, would
    be told else, of each of the requests that lay in sockets. Of what comes later all is known."""
    clocks = {"now": 100.0, "wall": 5_000.0}
    moment = moments(lambda: clocks["now"], lambda: clocks["wall"])

    def noted(wall_s: float) -> bytes:
        return struct.pack("ll", int(wall_s), round(1e9 * (wall_s % 1)))

    clocks |= {"now": 100.5, "wall": 5_000.5}
    assert moment(noted(5_000.25)) == pytest.approx(100.25)
    for step_s in (3600.0, -7200.0):
        before = clocks["wall"]
        clocks["wall"] += step_s
        for ago_s in (0.3, 0.1, 0.2):
            assert moment(noted(before - ago_s)) == 0.0
        clocks["now"] += 0.5
        clocks["wall"] += 0.5
        assert moment(noted(before - 0.1)) == 0.0
        assert moment(noted(clocks["wall"] - 0.1)) == pytest.approx(clocks["now"] - 0.1)


class Connection:
    """Keeps what it is told."""

    arrived = -1.0

    def __init__(self) -> None:
        self.got = b""

    def data_received(self, data: memoryview) -> None:
        self.got += bytes(data)

    def eof_received(self) -> None:
        self.got += b"."

    def connection_lost(self, exc: Exception | None) -> None:
        self.got += b"!"

    def pause_writing(self) -> None:
        """It writes nothing."""

    resume_writing = pause_writing


@pytest.mark.parametrize("noted", [True, False])
@on_loop
async def test_where_the_kernel_notes_nothing_nothing_is_known_and_all_is_read(
    noted: bool,
) -> None:
    """A reader leaves its socket to the transport, also
    where nobody tells it that the connection is lost."""
    loop, connection = asyncio.get_running_loop(), Connection()
    with socket.create_server(("127.0.0.1", 0)) as server:
        if noted:
            note_arrivals([server])
        with socket.create_connection(server.getsockname()) as client:
            theirs, _ = server.accept()
            transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, theirs)
            reader = Reader(connection, Arrivals(), transport)
            transport.set_protocol(reader)
            for at in range(2):
                client.sendall(b"x" * 2**12)
                await until(lambda: len(connection.got) == 2**12 * (at + 1))  # noqa: B023
                assert (connection.arrived > 0) == noted
        await until(lambda: connection.got.endswith(b".!"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        Reader(connection, Arrivals(), Over(server))
        gc.collect()
        assert server.getsockname()


class Over(asyncio.Transport):
    """A transport of which nothing but its socket is asked."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
