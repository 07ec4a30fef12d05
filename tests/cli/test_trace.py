"""`headgate trace`: spans as bars."""

from __future__ import annotations

from typing import Any

from hypothesis import given, strategies as st

from command.trace import bar_of, drawn, in_order, plain, rows


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
        "",
        f"POST              {'█' * 30} 1,000.00 ms",
        f"  chat m          {' ' * 7}▐{'█' * 22}  750.00 ms !",
        f"    engine.decode {' ' * 15}{'█' * 15}  500.00 ms",
        "",
        "  queue    250.00 ms    25%",
        "  decode   750.00 ms    75%",
    ]


def test_requests_are_listed_with_why_they_are_kept() -> None:
    head, line = rows([TRACE])
    assert head.split() == ["request", "tier", "model", "status", "first", "token", "whole"]
    assert line.split() == [
        "req_1", "standard", "m", "200", "250.00", "ms", "1,000.00", "ms", "late",
    ]  # fmt: skip


def test_a_terminal_obeys_nothing_that_a_client_has_written() -> None:
    (_, line) = rows([TRACE | {"model": "m\x1b[2J\x1b]0;mine\x07\n\x9bH"}])
    assert "m?[2J?]0;mine???H" in plain(line)
    assert plain("· █ ▐ Größe") == "· █ ▐ Größe"


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
