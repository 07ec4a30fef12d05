"""`headgate trace`: spans as bars."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, strategies as st

from command.trace import bar_of, drawn, in_order, is_trace, trace


def span(name: str, parent: str, start_s: float, end_s: float, **more: Any) -> dict[str, Any]:
    told = {"span_id": name, "parent_id": parent, "name": name, "start_s": start_s, "end_s": end_s}
    return told | {"status": "UNSET", "events": [], "attributes": {}} | more


TRACE = {
    "trace_id": "t", "request_id": "req_1", "tier": "standard", "model": "m", "status": 200,
    "error": "", "e2e_s": 1.0, "ttft_s": 0.25, "arm": "", "keep": "late",
    "spans": [
        span("chat m", "POST", 100.25, 101.0, status="ERROR"),
        span("POST", "elsewhere", 100.0, 101.0, attributes={
            "headgate.phase.queue_s": 0.25, "headgate.phase.decode_s": 0.75,
            "headgate.phase.trim_s": 0.0,
        }),
        span("engine.decode", "chat m", 100.5, 101.0),
    ],
}  # fmt: skip


def test_a_request_is_drawn_as_a_tree_with_bars_and_the_phases_below() -> None:
    assert drawn(TRACE, 60) == [
        "req_1  standard  m  200  1,000.00 ms",
        "trace t",
        "kept: late",
        "first token 250.00 ms",
        "",
        f"POST              {'█' * 30} 1,000.00 ms",
        f"  chat m          {' ' * 7}▐{'█' * 22}  750.00 ms !",
        f"    engine.decode {' ' * 15}{'█' * 15}  500.00 ms",
        "",
        "  queue    250.00 ms    25%",
        "  decode   750.00 ms    75%",
    ]


def test_a_status_is_told_once_and_an_error_by_its_name() -> None:
    """An error that has no code of its own was "400 400"."""
    for error, told in (("400", "400"), ("context_length_exceeded", "400 context_length_exceeded")):
        line = drawn(TRACE | {"status": 400, "error": error}, 60)[0]
        assert f"  {told}  " in line


def test_the_operator_s_key_opens_traces(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for all commands that ask /admin; a client's is named where it was tried."""
    error = json.dumps({"error": {"message": "not for you"}}).encode()
    for keys, sent in (
        ({}, "HEADGATE_ADMIN_KEY"),
        ({"HEADGATE_API_KEY": "a"}, "HEADGATE_API_KEY"),
        ({"HEADGATE_API_KEY": "a", "HEADGATE_ADMIN_KEY": "b"}, "HEADGATE_ADMIN_KEY"),
    ):
        for name in ("HEADGATE_API_KEY", "HEADGATE_ADMIN_KEY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        with answering(error, status=b"HTTP/1.1 401 Unauthorized") as url:
            assert trace("latest", url, as_json=False) == 2
        assert f"not for you ({sent} is sent along)" in capsys.readouterr().err


def test_who_answered_and_how_many_tokens_stand_above_the_bars() -> None:
    """As far as it is told: by a gateway before this one, none of it is."""
    told = TRACE | {
        "tenant": "acme", "replica": "http://10.0.0.7:8000", "tpot_s": 0.05,
        "prompt_tokens": 1500, "cached_tokens": 1024, "answer_tokens": 16,
    }  # fmt: skip
    assert drawn(told, 60)[2:4] == [
        "tenant acme, http://10.0.0.7:8000, kept: late",
        "first token 250.00 ms, each further 50.00 ms, 1,500 prompt tokens, 1,024 of them cached, "
        "16 answered",
    ]
    untold = TRACE | {"ttft_s": None, "keep": "", "tenant": 7, "prompt_tokens": "x"}
    assert drawn(untold, 60)[2] == ""


def test_spans_whose_parent_is_not_known_stand_at_the_left() -> None:
    assert [(depth, one["name"]) for depth, one in in_order(TRACE["spans"])] == [
        (0, "POST"), (1, "chat m"), (2, "engine.decode"),
    ]  # fmt: skip


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10), st.integers(1, 200))
def test_every_bar_shows_and_stays_inside(start: float, more: float, rest: float, cells: int):
    """Also of a span that took no time, and of one at the very end."""
    whole_s = start + more + rest
    bar = bar_of(span("a", "", 5 + start, 5 + start + more), 5.0, whole_s, cells)
    assert len(bar) == cells
    assert bar.strip()


@contextmanager
def answering(
    body: bytes,
    status: bytes = b"HTTP/1.0 200 OK",
    heard: list[tuple[str, str | None]] | None = None,
) -> Iterator[str]:
    """The URL of a server that says this, whatever it is asked. `heard`: paths, and with which
    key."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if heard is not None:
                heard.append((self.path, self.headers["authorization"]))
            self.wfile.write(status + b"\r\ncontent-type: application/json\r\n\r\n" + body)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    told = deepcopy(TRACE)
    change(told)
    return json.dumps(told).encode()


FOREIGN = [
    b"{}", b"[]", b"7", b"null", b'"text"', b"not json", b"\xff\xfe", b"[" * 9000,
    b'{"data": [], "object": "list"}', b'{"detail": "Not Found", "spans": []}',
    changed(lambda told: told.update(spans=[])),
    changed(lambda told: told.update(spans=[7])),
    changed(lambda told: told.update(e2e_s=float("inf"))),
    changed(lambda told: told.update(e2e_s=10**400)),
    changed(lambda told: told["spans"][0].pop("parent_id")),
    changed(lambda told: told["spans"][0].update(start_s="soon")),
    changed(lambda told: told["spans"][0].update(span_id="")),
    changed(lambda told: told["spans"][1].update(parent_id="engine.decode")),
    changed(lambda told: told["spans"][0].update(events=[{"at": 1}])),
    changed(lambda told: told["spans"][1]["attributes"].update({"headgate.phase.trim_s": "x"})),
]  # fmt: skip


def test_another_server_at_the_url_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The bug: a server of something else answered JSON, and a traceback came."""
    for body in FOREIGN:
        with answering(body) as url:
            assert trace("req_1", url, as_json=False) == 1, body
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert f"{url}/admin/traces" in said.err
        assert "--url" in said.err


def test_what_is_no_http_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(b"", status=b"SSH-2.0-OpenSSH_9.2") as url:
        assert trace("latest", url, as_json=False) == 1
    assert "no gateway of Headgate" in capsys.readouterr().err


def test_what_a_gateway_tells_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    """What is checked refuses nothing that gateways tell; a request without a first token, too."""
    for told in (TRACE, TRACE | {"ttft_s": None}):
        with answering(json.dumps(told).encode()) as url:
            assert trace("req_1", url, as_json=False) == 0
        assert "req_1" in capsys.readouterr().out


def test_a_long_chain_of_spans_is_no_recursion() -> None:
    chain = [span(f"s{at}", f"s{at - 1}", at, at + 1.0) for at in range(5000)]
    assert is_trace(TRACE | {"spans": chain})
    assert [depth for depth, _ in in_order(chain)] == list(range(5000))


def test_spans_with_one_id_are_drawn_once_each() -> None:
    """Two processes may have told the same one, or made a circle of ids."""
    twice = [span("a", "", 0, 1), span("a", "a", 0, 1), span("b", "a", 0, 1)]
    assert [one["name"] for _, one in in_order(twice)] == ["a", "a", "b"]
