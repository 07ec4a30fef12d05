"""The sixteen faults of the public failoverbench, over real sockets: what a client sees of each.

The primary breaks, a fallback is well; `resume` is on where a stream has begun.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.end_to_end.stack import events
from tests.gateway.scripted import (
    ASKED,
    PROMPT_TOKENS,
    TEXT,
    TOKENS,
    Engine,
    Heard,
    cut,
    fleet,
    garble,
    heard,
    in_turn,
    refuse,
    stall,
)
from tests.gateway.world import (
    DONE,
    HELLO,
    Answer,
    Fake,
    Front,
    Peer,
    gateway,
    on_loop,
    pong,
    until,
    upstream,
)

ON = {"resume": "auto"}


def is_whole(got: Heard) -> None:
    """All of the text once, under one id, with one role, one end and a usage that counts once."""
    assert got.text == TEXT
    assert (len(got.ids), got.roles, got.done, got.error) == (1, 1, 1, None)
    assert got.usage == {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": len(TOKENS),
        "total_tokens": PROMPT_TOKENS + len(TOKENS),
    }


def asked(*fakes: Fake) -> list[int]:
    return [len(fake.requests) for fake in fakes]


# ---- 1 to 4: status codes -----------------------------------------------------------------------


@on_loop
async def test_01_a_429_with_retry_after_goes_to_another_replica() -> None:
    """At once; and the one that asked for a pause gets one from the requests that follow."""
    limited = refuse(429, "rate_limit_exceeded", retry_after="5")
    async with (
        upstream(limited) as primary,
        upstream(Engine("b")) as other,
        gateway(*fleet(primary, other)) as edge,
    ):
        for _ in range(3):
            is_whole(heard((await edge.post(ASKED)).content))
        assert asked(primary, other) == [1, 3]


@on_loop
async def test_01_with_nobody_else_the_wait_is_kept_or_passed_on() -> None:
    """A wait that fits is waited, to the full; one beyond the client's deadline is the client's."""
    short = refuse(429, "rate_limit_exceeded", retry_after="0.2")
    async with upstream(in_turn(short, Engine("a"))) as alone, gateway(alone) as edge:
        clock = asyncio.get_running_loop().time
        began = clock()
        is_whole(heard((await edge.post(ASKED)).content))
        assert clock() - began >= 0.199  # timers go by the millisecond
    async with upstream(in_turn(short, Engine("a"))) as alone, gateway(alone) as edge:
        response = await edge.post(ASKED, headers={"x-slo-deadline-ms": "100"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "0.2")
        assert asked(alone) == [1]


@pytest.mark.parametrize(("number", "status"), [(2, 429), (3, 503)])
@on_loop
async def test_02_and_03_what_stays_is_passed_on_honestly(number: int, status: int) -> None:
    """Every replica says the same: its own words and its Retry-After, after one try each."""
    full = refuse(status, "busy", retry_after="7")
    async with upstream(full) as one, upstream(full) as two, gateway(one, two) as edge:
        response = await edge.post(ASKED)
        assert (response.status_code, response.headers["retry-after"]) == (status, "7")
        assert response.json()["error"]["code"] == "busy"
        assert asked(one, two) == [1, 1]


@pytest.mark.parametrize("status", [429, 503])
@on_loop
async def test_02_and_03_without_retry_after_attempts_end(status: int) -> None:
    """No more than max_attempts, with pauses between them; then the last answer as it came."""
    async with upstream(refuse(status, "busy")) as alone, gateway(alone) as edge:
        response = await edge.post(HELLO)
        assert (response.status_code, response.json()["error"]["code"]) == (status, "busy")
        assert asked(alone) == [3]


@pytest.mark.parametrize("others", [0, 1])
@on_loop
async def test_04_a_500_that_comes_once_is_not_seen(others: int) -> None:
    """Asked again elsewhere, or, with nobody else, of the same replica."""
    once = in_turn(refuse(500, "internal"), Engine("a"))
    async with upstream(once) as primary, upstream(Engine("b")) as other:
        fakes = [primary, other][: others + 1]
        async with gateway(*fleet(*fakes)) as edge:
            is_whole(heard((await edge.post(ASKED)).content))
            assert sum(asked(primary, other)) == 2


# ---- 5 to 7: no answer --------------------------------------------------------------------------


async def reset(peer: Peer) -> None:
    peer.abort()


@on_loop
async def test_05_a_reset_before_the_first_byte_is_not_seen() -> None:
    """Nobody was answered anything: another replica is."""
    async with (
        upstream(reset) as primary,
        upstream(Engine("b")) as other,
        gateway(*fleet(primary, other)) as edge,
    ):
        is_whole(heard((await edge.post(ASKED)).content))
        assert edge.pool.replicas[0].circuit.in_a_row == 1


async def nothing(_: Peer) -> None:
    await asyncio.Event().wait()


@on_loop
async def test_06_a_silent_replica_is_left_for_another() -> None:
    """It took the request and says nothing, no headers: left after headers_failover_s."""
    limits = {"headers_failover_s": 0.1}
    async with (
        upstream(nothing) as primary,
        upstream(Engine("b")) as other,
        gateway(*fleet(primary, other), retries=limits) as edge,
    ):
        is_whole(heard((await edge.post(ASKED)).content))
        await until(lambda: primary.running == 0)
        assert primary.was_left


@on_loop
async def test_06_it_is_left_for_one_that_failed_before() -> None:
    """The first one failed once, the second one is silent: better the first one again."""
    once = in_turn(refuse(500, "internal"), Engine("a"))
    limits = {"headers_failover_s": 0.1}
    async with (
        upstream(once) as primary,
        upstream(nothing) as other,
        gateway(*fleet(primary, other), retries=limits) as edge,
    ):
        is_whole(heard((await edge.post(ASKED)).content))
        assert asked(primary, other) == [2, 1]


@on_loop
async def test_06_with_nobody_else_it_ends_with_504() -> None:
    """At first_byte_timeout_s, with no attempt behind it; that counts against the replica."""
    limits = {"headers_failover_s": 0.05}
    async with (
        upstream(nothing) as alone,
        gateway(alone, first_byte_timeout_s=0.2, retries=limits) as edge,
    ):
        response = await edge.post(ASKED)
        assert (response.status_code, asked(alone)) == (504, [1])
        assert edge.pool.replicas[0].circuit.in_a_row == 1


@on_loop
async def test_07_a_slow_first_token_fails_over_at_the_limit() -> None:
    """Headers and comments are no token. Slowness is no failure: no circuit counts it."""

    async def slow(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(b": still here\n\n")
        await asyncio.Event().wait()

    limits = {"ttft_failover_s": 0.1}
    async with (
        upstream(slow) as primary,
        upstream(Engine("b")) as other,
        gateway(*fleet(primary, other), retries=limits) as edge,
    ):
        is_whole(heard((await edge.post(ASKED)).content))
        await until(lambda: primary.running == 0)
        assert edge.pool.replicas[0].circuit.in_a_row == 0


# ---- 8 to 11: a stream that breaks --------------------------------------------------------------

BREAKS: dict[str, Callable[[Engine, int], Answer]] = {
    "08 cut": cut,
    "09 stall": stall,
    "10 malformed": garble,
}


@pytest.mark.parametrize("kind", ["headgate", "vllm", "openai"])
@pytest.mark.parametrize("after", [0, 1, 5, 8])
@pytest.mark.parametrize("fault", list(BREAKS))
@on_loop
async def test_08_to_10_a_broken_stream_goes_on_elsewhere(
    fault: str, after: int, kind: Any
) -> None:
    """Wherever it breaks, the client has one whole answer, and is told that two replicas gave it:
    by tokens at our own, by text at vLLM, said again where nothing else is known."""
    first, second = Engine("a"), Engine("b")
    async with (
        upstream(BREAKS[fault](first, after)) as primary,
        upstream(second) as other,
        gateway(*fleet(primary, other, kind=kind), **ON, idle_timeout_s=0.15) as edge,
    ):
        body = (await edge.post(ASKED)).content
        got = heard(body)
        is_whole(got)
        assert got.ids == {"chatcmpl-a"}
        assert b": the replica failed, another one goes on\n\n" in body
        assert b"token-ids" not in body
        way = {"headgate": "tokens", "vllm": "text", "openai": "again"}[kind]
        by = "again" if after == 0 else way
        assert got.resumed == {"by": by, "exact": by == "tokens"}
        assert ("begun_token_ids" in second.bodies[0]) == (by == "tokens")
        assert edge.pool.replicas[0].circuit.in_a_row == 1


@on_loop
async def test_08_who_is_made_of_the_same_goes_on_first_and_else_it_is_not_exact() -> None:
    """What has another fingerprint rounds otherwise: its tokens need not be those of an unbroken
    stream: it goes on where no twin of the first is left, and the client is told that this is not
    exact."""
    first, twin, odd = (Engine(name, fingerprint=of) for name, of in ("ax", "bx", "cy"))
    async with (
        upstream(cut(first, 2)) as primary,
        upstream(cut(twin, 5)) as other,
        upstream(odd) as stranger,
    ):
        replicas = fleet(primary, stranger, other, kind="headgate")
        replicas[1].weight = 100.0  # it would be asked next
        for one, fake in ((first, primary), (twin, other), (odd, stranger)):
            fake.fingerprint = json.dumps({"system_fingerprint": one.fingerprint}).encode()
        async with gateway(*replicas, **ON) as edge:
            await until(lambda: all(one.fingerprint for one in replicas))
            body = (await edge.post(ASKED)).content
        is_whole(heard(body))
        chunks = [one for one in events(body) if isinstance(one, dict)]
        told = [one["headgate"]["resumed"] for one in chunks if "headgate" in one]
        assert told == [{"by": "tokens", "exact": True}, {"by": "tokens", "exact": False}]
        assert [len(one.bodies[0].get("begun_token_ids", ())) for one in (twin, odd)] == [2, 5]


@pytest.mark.parametrize("fault", list(BREAKS))
@on_loop
async def test_08_to_10_where_nobody_can_go_on_it_is_told_in_band(fault: str) -> None:
    """What came is kept, then an error event and [DONE]: never a clean truncated answer, and never
    the event that is no JSON."""
    sampled = ASKED | {"temperature": 0.7}
    async with upstream(BREAKS[fault](Engine("a"), 4)) as primary, upstream(Engine("b")) as other:
        replicas = fleet(primary, other, kind="openai")
        async with gateway(*replicas, **ON, idle_timeout_s=0.15) as edge:
            got = heard((await edge.post(sampled)).content)
            assert got.text == "".join(TOKENS[:4])
            assert got.error is not None
            stalled = fault == "09 stall"
            code = "upstream_idle_timeout" if stalled else "upstream_stream_cut"
            assert (got.error["code"], got.done) == (code, 1)
            assert asked(other) == [0]


@on_loop
async def test_08_a_second_cut_is_survived_too() -> None:
    """Three replicas, two of which break, at different places."""
    engines = Engine("a"), Engine("b"), Engine("c")
    async with (
        upstream(cut(engines[0], 2)) as one,
        upstream(cut(engines[1], 5)) as two,
        upstream(engines[2]) as three,
    ):
        replicas = fleet(one, two, three, kind="headgate")
        replicas[1].weight = 100.0
        async with gateway(*replicas, **ON) as edge:
            got = heard((await edge.post(ASKED)).content)
            is_whole(got)
            assert engines[2].bodies[0]["begun_token_ids"] == [100, 101, 102, 103, 104]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"n": 2},
        {"guided_json": "{}"},
    ],
)
@on_loop
async def test_08_answers_that_are_more_than_text_are_not_gone_on_with(more: dict) -> None:
    """Tool calls, set forms, logprobs, several choices: the cut is told."""
    async with (
        upstream(cut(Engine("a"), 4)) as primary,
        upstream(Engine("b")) as other,
        gateway(*fleet(primary, other), **ON) as edge,
    ):
        got = heard((await edge.post(ASKED | more)).content)
        assert got.error is not None
        assert (got.error["code"], asked(other)) == ("upstream_stream_cut", [0])


@on_loop
async def test_11_a_missing_done_is_added_to_an_answer_that_is_complete() -> None:
    """finish_reason and usage came: nothing is missing but the end. Without `resume` it is told."""
    engine = Engine("a")

    async def unended(peer: Peer) -> None:
        await engine.say(peer, ending=False)
        await peer.end()

    async with (
        upstream(unended) as primary,
        upstream(Engine("b")) as other,
        gateway(*fleet(primary, other), **ON) as edge,
    ):
        is_whole(heard((await edge.post(ASKED)).content))
        assert asked(other) == [0]
        async with gateway(*fleet(primary, other)) as edge:
            got = heard((await edge.post(ASKED)).content)
            assert got.error is not None
            assert got.error["code"] == "upstream_stream_cut"


# ---- 12 and 13: what no replica would answer ----------------------------------------------------


@pytest.mark.parametrize("code", ["context_length_exceeded", "content_filter"])
@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("stream", [True, False])
@on_loop
async def test_12_and_13_errors_about_the_content_are_passed_on(
    code: str, status: int, stream: bool
) -> None:
    """Unchanged, after one attempt, whatever the status; no other replica sees the request."""
    async with (
        upstream(refuse(status, code)) as primary,
        upstream(pong) as other,
        gateway(*fleet(primary, other), **ON) as edge,
    ):
        response = await edge.post(ASKED | {"stream": stream})
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert asked(primary, other) == [1, 0]
        assert edge.pool.replicas[0].circuit.in_a_row == 0


@on_loop
async def test_13_an_answer_that_a_filter_ended_is_complete() -> None:
    """finish_reason content_filter is an answer, byte for byte."""
    engine = Engine("a")
    filtered = engine.chunk({"content": "The "}) + engine.chunk({}, finish_reason="content_filter")

    async def answer(peer: Peer) -> None:
        await peer.stream(filtered, DONE)

    async with (
        upstream(answer) as primary,
        upstream(pong) as other,
        gateway(*fleet(primary, other), **ON) as edge,
    ):
        assert (await edge.post(ASKED)).content == filtered + DONE
        assert asked(other) == [0]


# ---- 14 to 16 -----------------------------------------------------------------------------------


@on_loop
async def test_14_a_fallback_that_rejects_an_open_turn_says_the_answer_again() -> None:
    """It is asked from the beginning, and what the client has is left out; the next time it is not
    tried with an open turn at all."""
    picky = Engine("b", takes_open_turn=False)
    async with (
        upstream(cut(Engine("a"), 5)) as primary,
        upstream(picky) as other,
        gateway(*fleet(primary, other), **ON) as edge,
    ):
        for attempts in (2, 3):
            got = heard((await edge.post(ASKED)).content)
            is_whole(got)
            assert got.resumed == {"by": "again", "exact": False}
            assert asked(other) == [attempts]
            await until(lambda: edge.pool.replicas[0].healthy)


@on_loop
async def test_14_an_answer_that_differs_is_not_sewn_on() -> None:
    """Said again, it goes another way: what came is kept, and the cut is told."""
    other_words = Engine("b", takes_open_turn=False, text=["The ", "slow ", "red ", "hen."])
    async with (
        upstream(cut(Engine("a"), 5)) as primary,
        upstream(other_words) as other,
        gateway(*fleet(primary, other), **ON) as edge,
    ):
        got = heard((await edge.post(ASKED)).content)
        assert got.text == "".join(TOKENS[:5])
        assert got.error is not None
        assert "another way" in got.error["message"]


@on_loop
async def test_15_a_flapping_primary_is_found_out() -> None:
    """It fails every second time: every client is answered, and soon it is asked no more."""
    turns = [refuse(500, "internal"), Engine("a")] * 40
    breaker = {"share": 0.4, "min_requests": 10, "open_s": 60.0}
    async with (
        upstream(in_turn(*turns)) as primary,
        upstream(Engine("b")) as other,
        gateway(*fleet(primary, other), breaker=breaker) as edge,
    ):
        for _ in range(30):
            is_whole(heard((await edge.post(ASKED)).content))
        assert len(primary.requests) <= 12
        states = (await edge.client.get("/health")).json()["replicas"]
        assert [state["circuit"] for state in states] == ["open", "closed"]


FAULTS: dict[str, Answer] = {
    "429": refuse(429, "busy", retry_after="1"),
    "503": refuse(503, "busy", retry_after="1"),
    "500": refuse(500, "internal"),
    "reset": reset,
    "silent": nothing,
    "cut": cut(Engine("a"), 5),
    "stall": stall(Engine("a"), 5),
    "malformed": garble(Engine("a"), 5),
}


@pytest.mark.parametrize("kind", ["headgate", "vllm"])
@pytest.mark.parametrize("fault", list(FAULTS))
@on_loop
async def test_16_accounts_are_right_after_every_fault(fault: str, kind: Any) -> None:
    """Usage as if nothing had happened, no place kept, one more attempt in the budget, and the
    next request is served as ever."""
    limits = {"headers_failover_s": 0.1}
    async with upstream(FAULTS[fault]) as primary, upstream(Engine("b")) as other:
        replicas = fleet(primary, other, kind=kind)
        async with gateway(*replicas, **ON, idle_timeout_s=0.15, retries=limits) as edge:
            is_whole(heard((await edge.post(ASKED)).content))
            await nothing_is_left(edge)
            edge.pool.replicas[0].draining = True
            is_whole(heard((await edge.post(ASKED)).content))
            await nothing_is_left(edge)
            # A reset of a kept connection is a stale one, and was no attempt.
            assert asked(other) == [2]
            assert len(primary.requests) == 1 or fault == "reset"


async def nothing_is_left(edge: Front) -> None:
    await until(lambda: edge.pool.in_flight == 0)
    assert [replica.in_flight for replica in edge.pool.replicas] == [0, 0]


@on_loop
async def test_08_the_receipt_tells_both_replicas() -> None:
    """The one that broke and the one that went on; `headgate explain` shows them."""
    async with (
        upstream(cut(Engine("a"), 3)) as primary,
        upstream(Engine("b")) as other,
        gateway(*fleet(primary, other), **ON) as edge,
    ):
        response = await edge.post(ASKED)
        receipt = edge.live.edge.routing.receipts.get(response.headers["x-headgate-receipt"])
        assert receipt is not None
        assert [one.url for one in receipt.attempts] == [primary.url, other.url]


@pytest.mark.parametrize("fault", [refuse(503, "busy", retry_after="0.2"), cut(Engine("a"), 3)])
@on_loop
async def test_a_later_attempt_is_told_what_is_left_of_the_deadline(fault: Answer) -> None:
    """A replica counts from when it hears of the request."""

    async def slowly(peer: Peer) -> None:
        await asyncio.sleep(0.2)
        await fault(peer)

    headers = {"x-slo-deadline-ms": "60000"}
    async with (
        upstream(slowly) as primary,
        upstream(Engine("b")) as other,
        gateway(*fleet(primary, other), **ON) as edge,
    ):
        is_whole(heard((await edge.post(ASKED, headers=headers)).content))
        told = [one.requests[0].headers["x-slo-deadline-ms"] for one in (primary, other)]
        assert float(told[1]) <= float(told[0]) - 199  # timers go by the millisecond
        assert float(told[1]) > 30_000


@pytest.mark.parametrize("stream", [True, False])
@on_loop
async def test_a_request_has_a_total_limit_where_the_policy_has_one(stream: bool) -> None:
    """504, in band once the stream has begun; a long answer counts against nobody."""
    engine = Engine("a")

    async def slow(peer: Peer) -> None:
        if stream:
            await engine.say(peer, until=3)
        await asyncio.Event().wait()

    async with upstream(slow) as alone, gateway(alone, total_timeout_s=0.2) as edge:
        response = await edge.post(ASKED | {"stream": stream})
        error = heard(response.content).error if stream else response.json()["error"]
        assert error is not None
        assert error["code"] == "request_timeout"
        await until(lambda: alone.running == 0)
        assert edge.pool.replicas[0].circuit.in_a_row == 0


@on_loop
async def test_15_alone_an_open_circuit_is_told_and_closes_by_a_trial() -> None:
    """503 with the wait that is left, without asking the replica; then one request tries, and all
    is as before. Probes, which find it well all the time, do not close it."""
    broken = asyncio.Event()

    async def answer(peer: Peer) -> None:
        await (Engine("a") if broken.is_set() else refuse(500, "internal"))(peer)

    retries, breaker = {"max_attempts": 1}, {"failures": 3, "open_s": 1.5}
    async with upstream(answer) as alone, gateway(alone, retries=retries, breaker=breaker) as edge:
        for _ in range(3):
            assert (await edge.post(ASKED)).status_code == 500
        replica = edge.pool.replicas[0]
        response = await edge.post(ASKED)
        assert response.status_code == 503
        assert response.headers["retry-after"] in ("1", "2")
        assert response.json()["error"]["code"] == "no_replica"
        assert "failed its last requests" in response.json()["error"]["message"]
        assert len(alone.requests) == 3
        assert replica.healthy
        broken.set()
        await until(lambda: replica.circuit.allows(asyncio.get_running_loop().time()))
        is_whole(heard((await edge.post(ASKED)).content))
        assert replica.circuit.trial_at is None
