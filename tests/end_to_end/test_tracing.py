"""One trace per request, through gateway and worker, as a collector gets it."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest

from gateway.tallies import PHASES
from gateway.trace_ring import told as as_told
from policies.retrying import Breaker, Retries
from policies.tracing import Tracing
from telemetry.trace import begun, new_span_id, traceparent
from tests.collector import Received, whole
from tests.end_to_end.stack import CHAT, DEFAULTS, LIMIT_S, Stack, assert_idle, until
from tests.end_to_end.traced_client import (
    CUT,
    FAILS,
    FAULT,
    LATE,
    LEAVES,
    RESCUED,
    WHOLE,
    receive,
    send,
)
from tests.gateway.world import DONE, Front, Peer, Replica, gateway, on_loop, upstream

GATEWAY, RUNTIME = "headgate-gateway", "headgate-runtime"
CLIENT = (sys.executable, str(Path(__file__).with_name("traced_client.py")))
MISSED = ("504", "deadline_exceeded", "request_timeout")  # by the worker, or the gateway
INSIDE = {"engine.tokenize", "engine.queue", "engine.prefill", "engine.decode"}


def asked(stack: Stack, body: dict[str, Any], more: str = "") -> tuple[socket.socket, str, float]:
    """Sends a request of a new trace over a socket of its own; the trace's id, and when it went."""
    context = begun(1.0)
    sent = json.dumps(DEFAULTS[CHAT] | body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(sent)}\r\n{more}"
        f"traceparent: {traceparent(context.trace_id, new_span_id(), 3)}\r\n\r\n"
    )
    sock = socket.create_connection(("127.0.0.1", stack.port), timeout=30)
    return sock, context.trace_id, send(sock, head.encode() + sent)


def read_to_end(sock: socket.socket, *, stream: bool) -> float:
    """When the last byte of the answer had come."""
    got, reached = b"", 0.0
    while not got.endswith(b"0\r\n\r\n" if stream else b"}"):
        piece, reached = receive(sock)
        assert piece, got
        got += piece
    sock.close()
    return reached


def arrived(stack: Stack, trace_id: str, *services: str) -> list[Received]:
    """The spans of a trace, once these services, or both, have sent theirs."""
    wanted = set(services) or {GATEWAY, RUNTIME}

    def spans() -> list[Received]:
        return stack.collector.traces().get(trace_id, [])

    until(lambda: wanted <= {one.service for one in spans()}, LIMIT_S, lambda: str(spans()))
    return spans()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_request_is_one_tree_that_lasts_as_long_as_the_client_waited(
    stack: Stack, stream: bool
) -> None:
    """Of the SERVER span and of the phases in it; to 2 ms, by what the kernel notes of the client's
    packets, for eight of nine."""
    apart, took = [], {}
    for _ in range(9):
        sock, trace_id, sent = asked(stack, {"stream": stream, "max_tokens": 6})
        took[trace_id] = read_to_end(sock, stream=stream) - sent
    for trace_id, took_s in took.items():
        spans = arrived(stack, trace_id)
        root = whole(spans)
        phases = sum(root.attributes[f"headgate.phase.{name}_s"] for name in PHASES)
        assert abs(phases - root.s) < 1e-4
        apart.append(abs(took_s - root.s))
    names = {span.name for span in spans}
    assert names >= INSIDE | {f"POST {CHAT}", "gateway.admit", "gateway.route", "chat pocket"}
    by_id = {span.span_id: span for span in spans}
    (request,) = (span for span in spans if span.name == "llm_request")
    assert by_id[request.parent_id].name == "chat pocket"
    (prefill,) = (span for span in spans if span.name == "engine.prefill")
    assert "prefill_chunk" in prefill.events
    for span in spans:
        assert span.flags & 3 == 3
        if span.parent_id in by_id:
            above = by_id[span.parent_id]
            slack_ns = 2_000_000  # two processes read the same clock at two moments
            assert above.start_ns - slack_ns <= span.start_ns
            assert span.end_ns <= above.end_ns + slack_ns
    print(f"apart from the client's clock: {[round(1000 * one, 2) for one in apart]} ms")
    assert sorted(apart)[-2] < 0.002


def test_under_load_with_clients_that_leave_every_request_is_one_tree(stack: Stack) -> None:
    """Thirty at once, every third of which leaves: at once, or in the middle of its answer."""
    names: dict[str, str] = {}

    def one(number: int) -> None:
        leaves = number % 3 == 0
        body = {"stream": True, "max_tokens": 200 if leaves else 8, "ignore_eos": True}
        sock, trace_id, _ = asked(stack, body)
        names[trace_id] = "left" if leaves else "whole"
        if not leaves:
            read_to_end(sock, stream=True)
            return
        if number % 2:
            sock.recv(2**12)
        sock.close()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_idle(stack.worker)
    for trace_id, what in names.items():
        spans = arrived(stack, trace_id, GATEWAY)
        root = whole(spans)
        assert (root.service, root.error) == (GATEWAY, False)
        if what == "whole":
            assert "engine.decode" in {span.name for span in arrived(stack, trace_id)}
        else:
            assert root.attributes["error.type"] == "client_cancelled"
            assert not any(span.error for span in spans)


def test_under_load_traces_last_as_long_as_a_client_in_its_own_process_waited(stack: Stack) -> None:
    """Eight at once, half of which miss their deadline or leave in the middle; nineteen in twenty
    traces are within 2 ms of the client's clock. That is the kernel's, from the request's packet on
    its way out to the last byte in the client's socket: what a client's own process loses is not
    the gateway's, and what lies unread at the gateway is. Of those that leave, the tree alone is
    compared."""
    kinds = (WHOLE, FAULT, WHOLE, LEAVES, WHOLE, LATE, WHOLE, LEAVES)
    told = subprocess.run(
        [*CLIENT, str(stack.port), "8", "8", *kinds], capture_output=True, timeout=240, check=True
    )
    assert_idle(stack.worker)
    rows, seen = json.loads(told.stdout), Counter[str]()
    for row in rows:
        root = row["root"] = whole(arrived(stack, row["trace_id"], GATEWAY))
        # A deadline that passes before a first token is the worker's status.
        why = {LEAVES: ("client_cancelled",), WHOLE: (None,)}.get(what := row["what"], MISSED)
        assert root.error == (what in (FAULT, LATE))
        assert root.attributes.get("error.type") in why
        seen[what] += 1
    assert seen == {WHOLE: 32, FAULT: 8, LATE: 8, LEAVES: 16}
    assert apart_s([row for row in rows if row["what"] != LEAVES]) < 0.002


def apart_s(rows: list[dict[str, Any]]) -> float:
    """At the 95th percentile, of what a client says and its trace; prints how that comes about."""
    found = defaultdict[str, list[float]](list)
    for row in rows:
        root = row["root"]
        found["apart"].append(abs(row["reached"] - row["sent"] - root.s))
        found["until the client sent"].append(row["sent"] - row["began"])
        found["until it came"].append(root.start_ns / 1e9 - row["sent"])
        found["until the gateway read"].append(root.attributes["headgate.phase.recv_queue_s"])
        found["after its last write"].append(row["reached"] - root.end_ns / 1e9)
        found["until the client read"].append(row["ended"] - row["reached"])
    p95 = {name: quantiles(each, n=20)[-1] for name, each in found.items()}
    for name, each in found.items():
        print(f"{name}: median {1000 * median(each):.2f}, p95 {1000 * p95[name]:.2f} ms")
    return p95["apart"]


@asynccontextmanager
async def rescued(
    stack: Stack, answer: Callable[[Peer], Awaitable[None]], **settings: Any
) -> AsyncIterator[Front]:
    """A gateway whose only replica answers so; the stack's worker goes on with its streams."""
    rescuer = Replica(stack.worker.url, own=True, kind="headgate", models={"pocket": {}})
    rescuer.healthy = True
    tracing = Tracing(endpoint=stack.collector.url)
    async with (
        upstream(answer, models=("pocket",)) as broken,
        gateway(
            Replica(broken.url, own=True, kind="headgate"),
            tracing=tracing,
            resume="auto",
            **settings,
        ) as front,
    ):
        front.pool.rescuers = lambda: (rescuer,)
        yield front


@on_loop
async def test_under_load_a_replica_that_fails_leaves_one_tree_and_the_right_outcome(
    stack: Stack,
) -> None:
    """Eight at once, three quarters of which meet a 500 that stays, a stream that breaks and that
    nobody goes on with, or a 500, then a break, and a real worker that ends it."""
    tries = Counter[str]()

    async def answer(peer: Peer) -> None:
        (message,) = json.loads(peer.request.body)["messages"]
        what, trace_id = message["content"], peer.request.headers["traceparent"].split("-")[1]
        tries[trace_id] += 1
        if what == FAILS or (what == RESCUED and tries[trace_id] == 1):
            await peer.json({"error": {"message": "no"}}, 500)
        elif what == WHOLE:
            await peer.stream(said("Hel"), DONE)
        else:
            await peer.head()
            await peer.chunk(said("Hel"))
            peer.abort()

    retries = Retries(budget_share=1.0, budget_min_per_s=1000)
    breaker = Breaker(failures=1000, min_requests=10**6)
    async with rescued(stack, answer, retries=retries, breaker=breaker) as front:
        kinds = (WHOLE, FAILS, RESCUED, CUT)
        client = await asyncio.create_subprocess_exec(
            *CLIENT, str(front.port), "8", "8", *kinds, stdout=asyncio.subprocess.PIPE
        )
        rows = json.loads((await client.communicate())[0])
    for row in rows:
        services = {GATEWAY, RUNTIME} if row["what"] == RESCUED else {GATEWAY}
        spans = await asyncio.to_thread(arrived, stack, row["trace_id"], *services)
        root = row["root"] = whole(spans)
        clients = sorted((one for one in spans if one.kind == 3), key=lambda one: one.start_ns)
        outcomes = [(one.attributes["headgate.outcome"], one.error) for one in clients]
        told = (root.attributes["http.response.status_code"], root.attributes.get("error.type"))
        assert (root.error, told, outcomes) == {
            WHOLE: (False, (200, None), [("200", False)]),
            FAILS: (True, (500, "500"), 3 * [("500", True)]),
            CUT: (True, (200, "upstream_stream_cut"), [("200", True)]),
            RESCUED: (False, (200, None), [("500", True), ("200", True), ("200", False)]),
        }[row["what"]]
        if row["what"] == RESCUED:
            (request,) = (one for one in spans if one.name == "llm_request")
            assert request.parent_id == clients[-1].span_id
    assert Counter(row["what"] for row in rows) == dict.fromkeys(kinds, 16)
    assert apart_s(rows) < 0.002


def said(text: str) -> bytes:
    """An event of a stream."""
    chunk = {
        "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "pocket",
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": text}}],
    }  # fmt: skip
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def test_a_failed_request_is_sent_though_it_was_not_sampled(stack: Stack) -> None:
    """The worker is asked for its spans then. Without `traceparent` a trace of its own begins."""
    answer = stack.client.post(
        stack.gateway.url + CHAT,
        json=DEFAULTS[CHAT] | {"max_tokens": 2000, "ignore_eos": True},
        headers={
            "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-00",
            "x-slo-deadline-ms": "300",
        },
    )
    assert answer.status_code == 504, answer.text
    spans = arrived(stack, "ab" * 16)
    root = whole(spans)
    assert root.error
    assert root.attributes["headgate.keep"] == "error"
    assert root.flags & 1 == 0
    traced = stack.client.get(f"{stack.gateway.url}/admin/traces/{answer.headers['x-request-id']}")
    told = traced.json()
    assert {span["name"] for span in told["spans"]} == {span.name for span in spans}
    assert {span["service"] for span in told["spans"]} == {GATEWAY, RUNTIME}


@on_loop
async def test_a_stream_that_breaks_and_goes_on_elsewhere_is_one_tree(stack: Stack) -> None:
    """A replica that answers 500, then one that breaks in the middle; a real worker ends it."""
    turns: Iterator[str] = iter(("500", "cut"))

    async def answer(peer: Peer) -> None:
        if next(turns, "cut") == "500":
            await peer.json({"error": {"message": "no"}}, 500)
            return
        await peer.head()
        await peer.chunk(said("Hel"))
        peer.abort()

    async with rescued(stack, answer) as front:
        answered = await front.post(DEFAULTS[CHAT] | {"stream": True, "max_tokens": 8})
        trace = as_told(next(iter(front.live.edge.tracer.ring)))
    assert answered.content.endswith(b"[DONE]\n\n")
    spans = await asyncio.to_thread(arrived, stack, trace["trace_id"])
    root = whole(spans)
    clients = sorted((one for one in spans if one.kind == 3), key=lambda one: one.start_ns)
    assert [one.attributes["headgate.outcome"] for one in clients] == ["500", "200", "200"]
    assert not root.error
    (request,) = (one for one in spans if one.name == "llm_request")
    assert request.parent_id == clients[-1].span_id
