"""Traces of a gateway: what is kept of a request, what goes on with it, and who may read it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, strategies as st

from command.trace import read
from gateway.account import Account
from gateway.meters import Meters
from gateway.phases import PHASES, phases
from gateway.tallies import Tallies, Tally
from gateway.trace_ring import told as as_told
from policies.tracing import Tracing
from telemetry.trace import begun, joined, traceparent
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Peer,
    Replica,
    gateway,
    held,
    on_loop,
    pong,
    until,
    upstream,
)

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03"

WAITS = ("gateway.upload", "gateway.recv_queue")  # spans that are there when the machine was busy


def named(trace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [span for span in trace["spans"] if span["name"] == name]


async def only(front: Any) -> dict[str, Any]:
    """The one trace that is kept, once its request has ended."""
    await until(lambda: len(front.live.edge.tracer.ring) == 1)
    return (await front.client.get("/admin/traces")).json()["traces"][0]


@on_loop
async def test_a_request_leaves_one_tree_of_spans_that_its_replica_joins() -> None:
    """The replica's `traceparent` names the CLIENT span; flags are those of the caller's, as bits;
    `tracestate` and `baggage` go on."""
    more = {"traceparent": PARENT, "tracestate": "a=1", "baggage": "b=2"}
    async with upstream() as fake, gateway(fake) as front:
        answer = await front.post(STREAMED, headers={**more, "x-request-id": "mine"})
        trace = await only(front)
        told = fake.requests[0].headers
    (client,) = named(trace, "chat m")
    assert told["traceparent"] == f"00-{trace['trace_id']}-{client['span_id']}-03"
    assert (told["tracestate"], told["baggage"]) == ("a=1", "b=2")
    (root,) = named(trace, "POST /v1/chat/completions")
    assert trace["trace_id"] == PARENT.split("-")[1]
    assert root["parent_id"] == PARENT.split("-")[2]
    parents = {span["parent_id"] for span in trace["spans"] if span is not root}
    assert parents == {root["span_id"]}
    kinds = [span["kind"] for span in trace["spans"] if span["name"] not in WAITS]
    assert kinds == ["SERVER", "INTERNAL", "INTERNAL", "INTERNAL", "CLIENT"]
    assert all(
        root["start_s"] <= span["start_s"] <= span["end_s"] <= root["end_s"] + 1e-6
        for span in trace["spans"]
    )
    assert trace["request_id"] == "mine"
    assert root["attributes"]["headgate.receipt"] == answer.headers["x-headgate-receipt"]
    phases = [root["attributes"][f"headgate.phase.{name}_s"] for name in PHASES]
    assert abs(sum(phases) - trace["e2e_s"]) < 1e-4


@on_loop
async def test_what_is_no_valid_trace_begins_a_new_one_and_takes_no_state_along() -> None:
    """Two `traceparent` are none; `tracestate` belongs to one; several of it are one list."""
    other = PARENT.replace("4bf9", "5bf9")
    one, two = ("tracestate", "a=1"), ("tracestate", "b=2")
    cases: list[tuple[list[tuple[str, str]], bool, str | None]] = [
        ([("traceparent", PARENT), one, two], True, "a=1,b=2"),
        ([("traceparent", PARENT)], True, None),
        ([one], False, None),
        ([("traceparent", "garbage"), one], False, None),
        ([("traceparent", PARENT), ("traceparent", other), one], False, None),
        ([("traceparent", f"{PARENT},{other}"), one], False, None),
        ([("traceparent", PARENT), ("tracestate", "a=" + "x" * 5000)], True, None),
    ]
    async with upstream() as fake, gateway(fake) as front:
        for headers, joins, state in cases:
            await front.client.post("/v1/chat/completions", json=HELLO, headers=headers)
            told = fake.requests[-1].headers
            assert (told["traceparent"].split("-")[1] == PARENT.split("-")[1]) == joins, headers
            assert told.get("tracestate") == state, headers
        ring = front.live.edge.tracer.ring
        await until(lambda: len(ring) == len(cases))
        states = [trail.tracestate for trail in ring]
    assert states == [state or "" for _, _, state in reversed(cases)]


@on_loop
async def test_where_nothing_is_traced_headers_go_on_as_lists() -> None:
    """Two `traceparent` are one that is not valid then, by which a replica begins anew, too."""
    both = [("traceparent", PARENT), ("traceparent", PARENT), ("tracestate", "a=1")]
    async with upstream() as fake, gateway(fake, tracing=Tracing(keep=0)) as front:
        more = [*both, ("tracestate", "b=2"), ("baggage", "c=3"), ("baggage", "d=4")]
        await front.client.post("/v1/chat/completions", json=HELLO, headers=more)
        told = fake.requests[-1].headers
    assert told["traceparent"] == f"{PARENT},{PARENT}"
    assert joined(told["traceparent"]) is None
    assert (told["tracestate"], told["baggage"]) == ("a=1,b=2", "c=3,d=4")


@on_loop
async def test_how_to_answer_is_on_the_span_and_no_more_of_it_than_fits() -> None:
    """Penalties and where to stop, too: the first four sequences, 64 characters of each."""
    body = HELLO | {"frequency_penalty": 1, "presence_penalty": -0.5, "stop": ["x" * 9000] * 9}
    async with upstream() as fake, gateway(fake) as front:
        await front.post(body)
        (span,) = named(await only(front), "chat m")
    told = {name.rpartition(".")[2]: value for name, value in span["attributes"].items()}
    assert (told["frequency_penalty"], told["presence_penalty"]) == (1.0, -0.5)
    assert told["stop_sequences"] == ["x" * 64] * 4


@on_loop
async def test_a_trace_is_found_by_the_id_of_request_receipt_and_answer() -> None:
    async def answer(peer: Peer) -> None:
        await peer.json({"id": "chatcmpl-7", "choices": []})

    async with upstream(answer) as fake, gateway(fake) as front:
        answered = await front.post(HELLO)
        trace = await only(front)
        names = ("x-request-id", "x-headgate-receipt")
        for name in (*(answered.headers[one] for one in names), "chatcmpl-7", trace["trace_id"]):
            found = await front.client.get(f"/admin/traces/{name}")
            assert found.json()["trace_id"] == trace["trace_id"]
        missing = await front.client.get("/admin/traces/none")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "trace_not_found"


@on_loop
async def test_a_trace_is_found_by_a_request_id_with_slashes_as_they_are_or_encoded() -> None:
    """The bug: such an id, which a client may give, was a path at which nothing is served."""
    name = "team/7//a b%2F/"
    async with upstream() as fake, gateway(fake) as front:
        await front.post(HELLO, headers={"x-request-id": name})
        await only(front)
        for safe in ("/", ""):
            path = quote(name, safe=safe)
            found = await front.client.get(f"/admin/traces/{path}")
            assert found.json().get("request_id") == name, found.text
        assert await asyncio.to_thread(read, name, front.url)
        missing = {
            path: (await front.client.get(f"{path}/a%2Fb/c")).json()["error"]["code"]
            for path in ("/admin/traces", "/admin/receipts", "/v1/receipts")
        }
    assert missing == {
        "/admin/traces": "trace_not_found",
        "/admin/receipts": "receipt_not_found",
        "/v1/receipts": "receipt_not_found",
    }


@on_loop
async def test_a_client_that_leaves_is_no_error_and_a_replica_that_fails_is_one() -> None:
    """Both end their spans; the failed attempt and the one that followed are two spans of one
    trace."""
    turns = iter((500, 200))

    async def answer(peer: Peer) -> None:
        if next(turns) == 500:
            await peer.json({"error": {"message": "no"}}, 500)
        else:
            await pong(peer)

    async with upstream(answer) as fake, gateway(fake) as front:
        await front.post(STREAMED)
        retried = await only(front)
        fake.answer = held(asyncio.Event(), b'data: {"choices":[]}\n\n')
        reader, writer = await front.send(STREAMED)
        await reader.readuntil(b"choices")
        writer.transport.abort()
        ring = front.live.edge.tracer.ring
        await until(lambda: len(ring) == 2)
        left = as_told(next(iter(ring)))
    clients = named(retried, "chat m")
    assert [one["attributes"]["headgate.outcome"] for one in clients] == ["500", "200"]
    assert [one["status"] for one in clients] == ["ERROR", "UNSET"]
    assert retried["error"] == ""
    assert left["error"] == "client_cancelled"
    assert {span["status"] for span in left["spans"]} == {"UNSET"}
    assert named(left, "chat m")[0]["attributes"]["error.type"] == "client_cancelled"


@pytest.mark.parametrize(
    ("error", "why", "fails", "outcome"),
    [
        ({"code": "deadline_exceeded"}, "deadline_exceeded", True, "timeout"),
        ({"code": None, "type": "InternalServerError"}, "InternalServerError", True, "error"),
        ({"code": 400, "type": "BadRequestError"}, "400", False, "refused"),
    ],
)
@on_loop
async def test_a_stream_that_ends_in_an_error_has_failed_unless_the_client_was_wrong(
    error: dict[str, Any], why: str, fails: bool, outcome: str
) -> None:
    """As a worker tells it when a deadline passes after the first token: the status is 200, and the
    stream comes to its end. The request to the replica has failed as well, and what is counted is
    how it ended: the bug was that a deadline counted as an error."""
    told = b"data: " + json.dumps({"error": {"message": "m", **error}}).encode() + b"\n\n"

    async def answer(peer: Peer) -> None:
        await peer.head()
        for piece in (b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', told[:30]):
            await peer.chunk(piece)
        await peer.chunk(told[30:] + DONE)
        await peer.chunk(b"")

    async with upstream(answer) as fake, gateway(fake) as front:
        answered = await front.post(STREAMED)
        trace = await only(front)
        (labels,) = front.live.edge.meters.requests
    assert answered.status_code == 200
    assert answered.content.endswith(told + DONE)
    assert labels[-1] == outcome
    root, client = trace["spans"][0], named(trace, "chat m")[0]
    assert trace["error"] == why
    for span in (root, client):
        assert span["attributes"]["error.type"] == why
        assert span["status"] == ("ERROR" if fails else "UNSET")
    assert trace["keep"] == ("error" if fails else "")


@on_loop
async def test_the_answer_is_the_attempts_that_the_client_has() -> None:
    """What an attempt took that failed counts as network, and its body's id is no answer's."""
    turns = iter((500, 200))

    async def answer(peer: Peer) -> None:
        if next(turns) == 500:
            await peer.json({"id": "wrong", "error": {"message": "no"}}, 500)
        else:
            await peer.stream(b'data: {"id":"chatcmpl-8","choices":[]}\n\n', DONE)

    async with upstream(answer) as fake, gateway(fake) as front:
        await front.post(STREAMED)
        trace = await only(front)
        (trail,) = front.live.edge.tracer.ring
        found = await front.client.get("/admin/traces/chatcmpl-8")
        wrong = await front.client.get("/admin/traces/wrong")
    assert trace["answer_id"] == "chatcmpl-8"
    assert (found.status_code, wrong.status_code) == (200, 404)
    failed, good = trail.hops
    assert trail.answered is good
    assert phases(trail)["network"] == good.began - failed.began


@on_loop
async def test_what_is_kept_of_a_request_is_no_larger_than_a_client_likes() -> None:
    body = HELLO | {"model": "m" * 100_000, "seed": ["s"] * 1000, "top_k": "k" * 1000, "n": 2}
    async with upstream() as fake, gateway(fake) as front:
        refused = await front.post(body)
        trace = await only(front)
        (trail,) = front.live.edge.tracer.ring
    assert refused.status_code == 404
    assert trail.asked == {"n": 2}
    assert trace["model"] == "m" * 256


@on_loop
async def test_limits_of_a_listing_are_numbers_of_sensible_length() -> None:
    async with upstream() as fake, gateway(fake) as front:
        for text in ("0", "-1", "1001", "x", "9" * 5000):
            answer = await front.client.get(f"/admin/traces?limit={text}")
            assert answer.status_code == 400, text[:9]


class Broken(Tally):
    def spend(self, seconds: Iterable[float]) -> None:
        raise RuntimeError(seconds)


class Breaking(Tallies):
    def of(self, tier: str) -> Tally:
        return Broken()


class Miscounting(Meters):
    def ended(self, account: Account, outcome: str, now: float) -> None:
        raise RuntimeError(outcome)


@on_loop
async def test_what_fails_while_a_request_is_told_of_fails_no_request(caplog) -> None:
    """Neither in its trace nor in its counts; both are logged with its id."""
    async with upstream() as fake, gateway(fake) as front:
        edge = front.live.edge
        edge = front.live.edge = replace(edge, meters=Miscounting())
        edge.admission.tallies = Breaking()
        answers = [await front.post(body) for body in (HELLO, STREAMED, HELLO | {"model": "none"})]
    assert [one.status_code for one in answers] == [200, 200, 404]
    assert answers[1].content.endswith(DONE)
    told = [record.getMessage() for record in caplog.records]
    for answer in answers:
        assert sum(answer.headers["x-request-id"] in line for line in told) == 2


@on_loop
async def test_server_timing_says_where_the_time_went_and_a_worker_is_asked_for_its_share() -> None:
    """A worker's comments are for the gateway alone: the client gets neither, and the phases are
    counted by tier."""

    async def answer(peer: Peer) -> None:
        assert peer.request.headers["x-headgate-timing"] == "1"
        await peer.stream(
            b': timing 2000.000,3000.000,0.000\n\ndata: {"choices":[]}\n\n',
            b": timing 0.010,0.020,0.030\n\n" + DONE,
        )

    def worker(url: str) -> Replica:
        return Replica(url, own=True, kind="headgate")

    async with upstream(answer) as fake, gateway(worker(fake.url)) as front:
        answered = await front.post(STREAMED)
        await only(front)
        spent = front.live.edge.admission.tallies.of("standard").phase_s
    assert answered.content == b'data: {"choices":[]}\n\n' + DONE
    timing = answered.headers["server-timing"]
    for name in ("route", "replica_queue", "prefill", "first_token", "total"):
        assert f"{name};dur=" in timing
    assert spent["replica_queue"] == 1e-5
    assert spent["prefill"] == 2e-5
    assert spent["decode"] <= 3e-5
    assert spent["network"] > 0


@on_loop
async def test_an_answer_has_one_server_timing_with_what_its_worker_told() -> None:
    """Also one that is no stream, of which a worker tells by the same header."""

    async def answer(peer: Peer) -> None:
        told = "replica_queue;dur=1.000, prefill;dur=2.000, decode;dur=3.000"
        await peer.json({"choices": []}, server_timing=told)

    async with upstream(answer) as fake, gateway(fake) as front:
        answered = await front.post(HELLO)
    (timing,) = answered.headers.get_list("server-timing")
    assert timing.count("prefill;dur=2.000") == timing.count("prefill") == 1


@on_loop
async def test_a_refused_request_leaves_a_trace_of_its_own() -> None:
    async with upstream() as fake, gateway(fake) as front:
        refused = await front.post({"model": "m"})
        trace = await only(front)
    assert refused.status_code == trace["status"] == 400
    assert "total;dur=" in refused.headers["server-timing"]
    assert [one["status"] for one in trace["spans"] if one["name"] not in WAITS] == ["UNSET"]


# ---- traceparent --------------------------------------------------------------------------------


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255))
def test_a_traceparent_that_was_written_is_read_again(trace: int, span: int, flags: int) -> None:
    """Flags are bits: what is not known is not passed on."""
    found = joined(traceparent(f"{trace:032x}", f"{span:016x}", flags))
    assert found is not None
    assert (int(found.trace_id, 16), int(found.span_id, 16)) == (trace, span)
    assert found.flags == flags & 3
    assert found.sampled == bool(flags & 1)


@given(st.text(max_size=70))
def test_any_text_is_no_traceparent(text: str) -> None:
    assert joined(text) is None


def test_what_is_no_traceparent_is_not_joined() -> None:
    """Version ff is forbidden, ids of zeros are none; what follows a later version is ignored."""
    version, trace, span, flags = PARENT.split("-")
    for wrong in (
        f"ff-{trace}-{span}-{flags}",
        f"{PARENT}-more",
        f"{version}-{'0' * 32}-{span}-{flags}",
        f"{version}-{trace}-{'0' * 16}-{flags}",
        f"{version}-{trace.upper()}-{span}-{flags}",
    ):
        assert joined(wrong) is None, wrong
    assert joined(f"01-{trace}-{span}-{flags}-more") == joined(PARENT)


def test_a_share_of_new_traces_is_sampled() -> None:
    assert all(begun(1.0).sampled for _ in range(20))
    assert not any(begun(0.0).sampled for _ in range(20))
    assert 0 < sum(begun(0.5).sampled for _ in range(200)) < 200


@on_loop
async def test_headgate_trace_draws_what_a_gateway_keeps() -> None:
    async with upstream() as fake, gateway(fake) as front:
        answered = await front.post(STREAMED)
        await only(front)

        async def headgate(*more: str) -> tuple[int | None, str]:
            command = (sys.executable, "-m", "headgate", "trace", "--url", front.url, *more)
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            told, _ = await process.communicate()
            return process.returncode, told.decode()

        code, told = await headgate(answered.headers["x-headgate-receipt"])
        (_, listed), (none, _) = await asyncio.gather(headgate("latest"), headgate("nothing"))
    assert (code, none) == (0, 2)
    for name in ("POST /v1/chat/completions", "  gateway.route", "  chat m", "█", "route"):
        assert name in told
    assert answered.headers["x-request-id"] in listed
