"""Streams at a reader's speed: nothing lost, nothing early, and no replica waits for a reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hypothesis import given, strategies as st
from starlette.types import Message

from gateway.pacing import FIRST, HELD_MAX_BYTES, Pace, Paced
from tests.gateway.world import DONE, STREAMED, Peer, gateway, on_loop, until, upstream

BURST = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % at for at in range(12)]
TIERS = {"standard": {"pace_chunks_per_s": 20}}


def test_a_burst_goes_on_one_event_at_a_time_and_its_first_token_at_once() -> None:
    """The role, and the first token; the end goes with the last one."""
    pace = Pace(10)
    pace.add(b"".join(BURST[:4]) + DONE, 5.0)
    assert pace.ready(5.0) == b"".join(BURST[:FIRST])
    assert pace.ready(5.09) == b""
    assert abs(pace.wait_s(5.04) - 0.06) < 1e-9
    assert pace.ready(5.11) == BURST[2]
    assert pace.ready(5.201) == BURST[3] + DONE  # a late timer delays none behind it
    assert not pace.holds and pace.over and pace.size_bytes == 0


def test_a_pause_earns_no_burst_and_a_slow_stream_is_not_held() -> None:
    pace = Pace(10)
    for at, event in enumerate(BURST[:6]):
        pace.add(event, 7.0 + at)
        assert pace.ready(7.0 + at) == event
    pace.add(BURST[6] + BURST[7], 100.0)
    assert pace.ready(100.0) == BURST[6]
    pace.not_before(200.0)  # the reader was away
    pace.add(BURST[8], 200.0)
    assert pace.ready(200.0) == BURST[7]


def test_an_error_waits_for_nobody_and_a_comment_for_what_is_before_it() -> None:
    pace = Pace(10)
    pace.add(b": alive\n\n" + b"".join(BURST[:3]) + b": more\n\n" + BURST[3], 0.0)
    assert pace.ready(0.0) == b": alive\n\n" + BURST[0] + BURST[1]
    assert pace.ready(0.1) == BURST[2] + b": more\n\n"
    error = b'event: error\r\ndata: {"error":{}}\r\n\r\n'
    pace.add(error, 0.11)
    assert pace.ready(0.11) == BURST[3] + error


def test_an_event_that_never_ends_does_not_grow_for_ever() -> None:
    pace = Pace(1)
    pace.add(b"data: " + b"x" * HELD_MAX_BYTES, 0.0)
    assert len(pace.ready(0.0)) == HELD_MAX_BYTES + 6


@given(
    texts=st.lists(st.sampled_from(["a", "b\\n", ": c"]), max_size=20),
    end=st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"]),
    cuts=st.lists(st.integers(1, 9), min_size=1),
    gaps=st.lists(st.floats(0, 0.4), min_size=1),
)
def test_bytes_keep_their_order_events_stay_whole_and_the_rate_is_kept(
    texts: list[str], end: bytes, cuts: list[int], gaps: list[float]
) -> None:
    """However the stream is cut, and whenever anybody looks."""
    stream = b"".join(b"data: " + text.encode() + end for text in texts) + b"data: half"
    pace, now, sent, at, turn = Pace(10), 3.0, b"", 0, 0
    while at < len(stream) or pace.holds:
        size = cuts[turn % len(cuts)]
        pace.add(stream[at : at + size], now)
        at += size
        ready = pace.ready(now)
        sent += ready
        assert not ready or ready.endswith(end)
        assert sent.count(end) <= FIRST + (now - 3.0) * 10 + 1e-6
        now += max(gaps[turn % len(gaps)], 0.01)
        turn += 1
    assert sent + pace.rest() == stream


class Client:
    """A connection that takes what it is given, and lags when it is told to."""

    asked = True

    def __init__(self) -> None:
        self.got = b""
        self.lags = False
        self.go_on: Callable[[], None] | None = None

    def stream(self, chunk: bytes) -> bool:
        self.got += chunk
        return not self.lags

    def when_writable(self, go_on: Callable[[], None]) -> None:
        self.go_on = go_on

    def when_gone(self, leave: Callable[[], None] | None) -> bool:
        return leave is None

    async def send(self, message: Message) -> None:
        self.got += message["body"]


@on_loop
async def test_what_is_held_is_bounded_and_a_lagging_client_holds_all_back() -> None:
    client = Client()
    way = Paced(client.send, client, Pace(20), asyncio.get_running_loop())
    more: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    event = b"data: " + b"x" * 20_000 + b"\n\n"
    count = 1
    while way.stream(event):
        count += 1
    assert FIRST * len(event) + HELD_MAX_BYTES < count * len(event) < 2 * HELD_MAX_BYTES
    way.when_writable(lambda: more.set_result(None))
    await more
    assert len(client.got) >= HELD_MAX_BYTES / 2
    client.lags = True
    await until(lambda: client.go_on is not None)
    before = len(client.got)
    assert not way.stream(event)
    await way({"type": "http.response.body", "body": b"end", "more_body": False})
    client.lags = False
    assert client.go_on is not None
    client.go_on()
    await way.drained()
    await way.end()
    assert before < len(client.got) == (count + 1) * len(event) + 3
    assert client.got.endswith(b"end")


async def burst(peer: Peer) -> None:
    await peer.stream(b"".join(BURST) + DONE)


@on_loop
async def test_the_replica_is_free_while_its_reader_still_reads() -> None:
    """The whole answer, byte for byte, not sooner than a reader reads it; other tiers' at once."""
    loop = asyncio.get_running_loop()
    async with upstream(burst) as fake, gateway(fake, tiers=TIERS) as edge:
        begun = loop.time()
        got = b""

        async def got_when_free() -> int:
            await until(lambda: fake.requests != [] and edge.pool.replicas[0].in_flight == 0)
            return len(got)

        freeing = asyncio.create_task(got_when_free())
        async with edge.client.stream("POST", "/v1/chat/completions", json=STREAMED) as answer:
            async for piece in answer.aiter_bytes():
                assert got or piece.startswith(BURST[0] + BURST[1])
                got += piece
        assert got == b"".join(BURST) + DONE
        assert loop.time() - begun >= (len(BURST) - FIRST) / 20 - 0.02
        assert await freeing < len(got)
        plain = await edge.post(STREAMED, headers={"x-headgate-tier": "batch"})
        assert plain.content == got


@on_loop
async def test_a_cut_is_told_at_once_behind_all_that_came() -> None:
    async def cut(peer: Peer) -> None:
        await peer.stream(b"".join(BURST) + b"data: {")

    slow = {"standard": {"pace_chunks_per_s": 1}}
    async with upstream(cut) as fake, gateway(fake, tiers=slow) as edge:
        begun = asyncio.get_running_loop().time()
        body = (await edge.post(STREAMED)).content
        assert asyncio.get_running_loop().time() - begun < 5
        assert body.startswith(b"".join(BURST) + b"data: {\n\n")
        assert b'"error"' in body and body.endswith(DONE)


@on_loop
async def test_a_client_that_leaves_while_it_is_paced_leaves_nothing_behind() -> None:
    slow = {"standard": {"pace_chunks_per_s": 1}}
    async with upstream(burst) as fake, gateway(fake, tiers=slow) as edge:
        reader, writer = await edge.send(STREAMED)
        await reader.readuntil(BURST[1])
        begun = asyncio.get_running_loop().time()
        writer.transport.abort()
        await until(lambda: edge.pool.in_flight == 0)
        assert asyncio.get_running_loop().time() - begun < 5


@on_loop
async def test_an_answer_in_one_piece_is_not_paced() -> None:
    async with upstream() as fake, gateway(fake, tiers=TIERS) as edge:
        answer = await edge.post({**STREAMED, "stream": False})
        assert answer.json() == {"choices": []}


@on_loop
async def test_a_limit_that_ends_the_request_passes_the_rest_on_at_once() -> None:
    """The answer is there, so it is told whole instead of an error."""
    slow = {"standard": {"pace_chunks_per_s": 1}}
    async with upstream(burst) as fake, gateway(fake, tiers=slow, total_timeout_s=1) as edge:
        begun = asyncio.get_running_loop().time()
        body = (await edge.post(STREAMED)).content
        assert asyncio.get_running_loop().time() - begun < 5
        assert body == b"".join(BURST) + DONE


@on_loop
async def test_a_long_burst_holds_its_replica_back_and_goes_on_whole() -> None:
    """More than is held and the sockets take: the replica waits, and is read again."""
    long = b"".join(b"data: %04d%s\n\n" % (at, b"x" * 20_000) for at in range(3000))
    got = bytearray()
    read_by_then = 0  # by the client, when the replica had said it all

    async def tell(peer: Peer) -> None:
        nonlocal read_by_then
        await peer.head()
        for at in range(0, len(long), 2**16):
            await peer.chunk(long[at : at + 2**16])
        read_by_then = len(got)
        await peer.chunk(DONE)
        await peer.end()

    tiers = {"standard": {"pace_chunks_per_s": 3000}}
    async with upstream(tell) as fake, gateway(fake, tiers=tiers) as edge:
        async with edge.client.stream("POST", "/v1/chat/completions", json=STREAMED) as answer:
            async for piece in answer.aiter_bytes():
                got += piece
        whole = got == long + DONE  # apart: a difference of 60 MB is nothing to show
        assert whole
        unread = len(long) - read_by_then
        assert unread < len(long) / 2  # that much sockets take
