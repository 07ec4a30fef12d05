"""How evenly a stream goes: first token, gaps and stalls, by given moments."""

from __future__ import annotations

import pytest

from gateway.pulse import GAPS_MAX, Pulse

ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


def test_the_first_token_is_the_first_piece_that_says_something() -> None:
    pulse = Pulse()
    pulse.beat(b": keep-alive\n\n", 0.0, 1.0)
    pulse.beat(ROLE, 1.0, 2.0)
    assert pulse.first_at is None
    pulse.beat(TEXT, 2.0, 3.0)
    pulse.beat(TEXT, 3.0, 4.0)
    assert (pulse.first_at, pulse.last_at) == (3.0, 4.0)


def test_pieces_are_counted_from_the_first_that_says_something() -> None:
    """However many, and before and after they were judged."""
    pulse = Pulse()
    pulse.beat(ROLE, 0.0, 0.0)
    assert pulse.pieces == 0
    for at in range(GAPS_MAX + 5):
        pulse.beat(TEXT, at, at + 1)
    assert pulse.pieces == GAPS_MAX + 5
    pulse.stalls()
    assert pulse.pieces == GAPS_MAX + 5


@pytest.mark.parametrize(
    "chunk",
    [
        TEXT,
        b'data: {"choices":[{"text": "x"}]}',
        b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}',
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}',
    ],
)
def test_text_thoughts_and_calls_all_say_something(chunk: bytes) -> None:
    pulse = Pulse()
    pulse.beat(chunk, 0.0, 1.0)
    assert pulse.first_at == 1.0


def beaten(*gaps: float) -> Pulse:
    pulse, now = Pulse(), 0.0
    pulse.beat(TEXT, now, now)
    for gap in gaps:
        pulse.beat(TEXT, now, now + gap)
        now += gap
    return pulse


def test_a_stall_is_a_gap_far_above_the_usual_one() -> None:
    """Over five times the median and over 50 ms; a stream that is slow all along has none."""
    assert beaten(*[0.02] * 20, 0.11, *[0.02] * 20).stalls() == 1
    assert beaten(*[0.02] * 20, 0.09).stalls() == 0
    assert beaten(*[0.001] * 20, 0.04).stalls() == 0
    assert beaten(*[0.5] * 20).stalls() == 0
    pulse = beaten(*[0.02] * (GAPS_MAX + 10), 0.3)
    assert pulse.stalls() == 1
    assert pulse.longest_s == pytest.approx(0.3)


def test_a_pause_that_the_client_asked_for_is_no_gap() -> None:
    pulse = beaten(0.01)
    pulse.beat(TEXT, since=100.0, now=100.01)
    assert pulse.stalls() == 0
    assert pulse.longest_s == pytest.approx(0.01)


def test_bytes_after_the_client_has_left_are_counted() -> None:
    pulse = beaten(0.01)
    assert pulse.bytes_in_vain == 0
    pulse.left()
    pulse.beat(TEXT, 0.01, 0.02)
    assert pulse.bytes_in_vain == len(TEXT)
