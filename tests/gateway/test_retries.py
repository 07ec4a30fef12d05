"""What an answer means, and how many extra attempts a fleet may get."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from gateway.retries import (
    WINDOW_S,
    Budget,
    Meaning,
    error_in_band,
    meaning,
    retry_after_s,
)


def error(code: object, kind: str = "server_error") -> bytes:
    return json.dumps({"error": {"message": "no", "type": kind, "code": code}}).encode()


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        (200, {}, b"", Meaning.ANSWER),
        (400, {}, error("context_length_exceeded"), Meaning.ANSWER),
        (404, {}, error("model_not_found"), Meaning.ANSWER),
        (408, {}, b"", Meaning.BROKEN),
        (429, {}, error("rate_limit_exceeded"), Meaning.BUSY),
        (500, {}, b"<html>", Meaning.BROKEN),
        (500, {}, error("content_filter"), Meaning.ANSWER),
        (500, {}, error(None, "context_length_exceeded"), Meaning.ANSWER),
        (500, {}, b'{"error":{"message":"content_filter is down"}}', Meaning.BROKEN),
        (501, {}, b"", Meaning.ANSWER),
        (503, {}, b"", Meaning.BROKEN),
        (503, {"retry-after": "3"}, b"", Meaning.BUSY),
        (504, {}, error("deadline_exceeded"), Meaning.ANSWER),
        (502, {}, b'["error"]', Meaning.BROKEN),
    ],
)
def test_what_an_answer_says_of_its_replica(
    status: int, headers: dict[str, str], body: bytes, expected: Meaning
) -> None:
    """Refusals of what was asked are answers, whatever their status; the rest is busy or broken."""
    assert meaning(status, headers, body) is expected


def test_a_stream_that_begins_with_an_error_is_known_by_it() -> None:
    """vLLM and SGLang say 200 before they know; text that speaks of errors is no error."""
    assert error_in_band(b"data: " + error(429) + b"\n\n") == (429, error(429))
    assert error_in_band(b"data:" + error("x") + b"\n\n") == (500, error("x"))
    assert error_in_band(b'data: {"choices":[{"delta":{"content":"\\"error\\""}}]}\n\n') is None
    assert error_in_band(b'data: {"error":') is None
    assert error_in_band(b'data: {"error":null,"choices":[]}\n\n') is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, expected: float | None) -> None:
    """RFC 9110; what cannot be read is no promise."""
    assert retry_after_s({"retry-after": text}, 60.0) == expected


events = st.lists(st.tuples(st.floats(0.0, 3.0), st.booleans()), max_size=200)


@given(events, st.floats(0.0, 1.0), st.floats(0.0, 2.0))
def test_retries_stay_within_their_share_of_the_traffic(
    steps: list[tuple[float, bool]], share: float, min_per_s: float
) -> None:
    """Whenever one is granted: all of nine seconds are within what ten seconds' requests allow.

    (Requests are forgotten by the second, so that ten exact seconds may see one slot more.)
    """
    budget, now = Budget(share, min_per_s), 0.0
    requests: list[float] = []
    granted: list[float] = []
    for pause_s, is_request in steps:
        now += pause_s
        if is_request:
            budget.request(now)
            requests.append(now)
        elif budget.take(now):
            granted.append(now)
            seen = sum(now - at <= WINDOW_S for at in requests)
            recent = sum(now - at < WINDOW_S - 1 for at in granted)
            assert recent <= share * seen + min_per_s * WINDOW_S


@given(st.integers(0, 50), st.integers(0, 50))
def test_what_the_share_allows_is_granted(requests: int, asked: int) -> None:
    """Not only a bound: a retry within the budget is never refused."""
    budget = Budget(0.5, 0.2)
    for _ in range(requests):
        budget.request(0.0)
    granted = sum(budget.take(0.1) for _ in range(asked))
    assert granted == min(asked, int(0.5 * requests + 2))
    assert budget.take(WINDOW_S + 0.2), "what is ten seconds old is forgotten"
