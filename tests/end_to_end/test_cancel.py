"""A client that leaves: its sequences end and its blocks are free, in whatever phase it left.

The times are printed, not asserted to the millisecond: speed is a benchmark's business.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.end_to_end.stack import (
    CHAT,
    COMPLETIONS,
    DEFAULTS,
    LIMIT_S,
    Stack,
    assert_idle,
    idle,
    until,
)

# CPU time of the worker from the leaving to the end: a second of its two threads. Whole answers
# take several times that. Wall time would say how busy the machine is.
LIMIT_CPU_S = 2.0
LONG = {"max_tokens": 100, "ignore_eos": True}
TOKENS = itertools.count(300)  # a prompt that is known is not computed
ENDLESS = {"max_tokens": 2000, "ignore_eos": True}


def send(stack: Stack, path: str, body: dict[str, Any]) -> socket.socket:
    """The request over a socket of its own."""
    sent = json.dumps(DEFAULTS[path] | body).encode()
    sock = socket.create_connection(("127.0.0.1", stack.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(sent)}\r\n\r\n"
    sock.sendall(head.encode() + sent)
    return sock


def works_in(stack: Stack) -> Callable[[], bool]:
    return lambda: bool(stack.worker.health()["blocks"]["in_use"])


def read_chunks(sock: socket.socket, count: int) -> bytes:
    got = b""
    while got.count(b"data: ") < count:
        more = sock.recv(2**16)
        assert more, got
        got += more
    return got


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("phase", ["sent", "prefill", "decode"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_frees_everything(
    stack: Stack, phase: str, how: str, stream: bool
) -> None:
    """At once after sending, during prefill, and between tokens; by FIN and by RST."""
    assert_idle(stack.worker)
    long = LONG | {"n": 2, "prompt": [next(TOKENS)] * 1900}
    asked = long if phase == "prefill" else ENDLESS
    path = COMPLETIONS if phase == "prefill" else CHAT
    sock = send(stack, path, asked | {"stream": stream})
    if phase == "prefill":
        until(works_in(stack), LIMIT_S, lambda: "the prefill never began")
    elif phase == "decode":
        if stream:
            read_chunks(sock, 5)
        else:
            until(works_in(stack), LIMIT_S, lambda: "the answer never began")
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    before_s = stack.worker.cpu_s()
    sock.close()
    # A step that runs is not broken off: blocks are free after it, cancelled or not.
    told_s = until(lambda: not stack.worker.health()["streams"], LIMIT_S, lambda: "never cancelled")
    free_s = told_s + until(lambda: gone(stack), LIMIT_S, lambda: f"left: {stack.worker.health()}")
    print(
        f"left by {how} ({phase}, stream={stream}): the worker knows after {told_s * 1000:.0f} ms, "
        f"all is free after {free_s * 1000:.0f} ms"
    )
    assert stack.worker.cpu_s() - before_s < LIMIT_CPU_S
    assert stack.works()


def gone(stack: Stack) -> bool:
    return idle(stack.worker) and stack.gateway.health()["in_flight"] == 0


def test_choices_of_one_request_all_end_with_it(stack: Stack) -> None:
    """16 sequences of one client are cancelled together."""
    sock = send(stack, CHAT, ENDLESS | {"n": 16, "stream": True, "temperature": 1})
    read_chunks(sock, 32)
    before_s = stack.worker.cpu_s()
    sock.close()
    until(lambda: gone(stack), LIMIT_S, lambda: str(stack.worker.health()))
    assert stack.worker.cpu_s() - before_s < LIMIT_CPU_S


def test_a_client_that_leaves_does_not_disturb_another(stack: Stack) -> None:
    """The one that stays gets the same greedy answer as alone."""
    asked = {"max_tokens": 60, "ignore_eos": True, "prompt": "Order 12 is"}
    alone = stack.ask(COMPLETIONS, **asked)["choices"][0]["text"]
    with send(stack, COMPLETIONS, asked | {"stream": True}) as staying:
        read_chunks(staying, 3)
        leaving = [send(stack, CHAT, ENDLESS | {"stream": True}) for _ in range(4)]
        for sock in leaving:
            sock.close()
        rest = b""
        while b"[DONE]" not in rest:
            rest += staying.recv(2**16)
    assert b'"error"' not in rest
    assert stack.ask(COMPLETIONS, **asked)["choices"][0]["text"] == alone
