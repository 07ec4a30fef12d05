"""Whether a request may be sent again: what an answer means, and the budget. Pure; no sockets.

Sources: "Retry budgets" of Finagle and SRE (Google), chapter 21; RFC 9110, section 10.2.3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any

import orjson

WINDOW_S = 10.0
SLOTS = 10  # of the window
REFUSED_FOR_ITS_CONTENT = (
    "content_filter",
    "content_policy",
    "context_length",
    "context_window",
    "deadline_exceeded",
    "string_above_max_length",
    "prompt_too_long",
)


class Meaning(Enum):
    """What an answer says of the replica that gave it."""

    ANSWER = "answer"  # its own business and the client's: passed on, whatever the status
    BUSY = "busy"  # it is well and full: another one may have room, or itself in a while
    BROKEN = "broken"  # it failed at something that another one may do


def meaning(status: int, headers: Mapping[str, str], body: bytes) -> Meaning:
    """Of an answer's status, headers and, where it is an error, the beginning of its body."""
    if status < 400:
        return Meaning.ANSWER
    if status == 429:
        return Meaning.BUSY
    if status < 500 and status != 408:
        return Meaning.ANSWER
    if status == 501 or names_content(body):
        return Meaning.ANSWER
    if status == 503 and "retry-after" in headers:
        return Meaning.BUSY
    return Meaning.BROKEN


def names_content(body: bytes) -> bool:
    """Whether an error says that what was asked is refused, by whomever it is asked for.

    Looks at `code` and `type` of OpenAI's error shape only: a message may quote anything.
    """
    try:
        error = orjson.loads(body).get("error")
    except (orjson.JSONDecodeError, AttributeError):
        return False
    named = (error.get("code"), error.get("type")) if isinstance(error, dict) else ()
    return any(
        isinstance(name, str) and any(word in name for word in REFUSED_FOR_ITS_CONTENT)
        for name in named
    )


def error_in_band(event: bytes) -> tuple[int, bytes] | None:
    """Status and body of an error that an accepted stream begins with; None for anything else.

    vLLM and SGLang answer 200 at once and tell of failures in the first event.
    """
    if b'"error"' not in event or not event.startswith(b"data:"):
        return None
    body = event[5:].split(b"\n", 1)[0].strip()
    try:
        error = orjson.loads(body).get("error")
    except (orjson.JSONDecodeError, AttributeError):
        return None
    if not isinstance(error, dict):
        return None
    code: Any = error.get("code")
    return (code if type(code) is int and 400 <= code < 600 else 500), body


def retry_after_s(headers: Mapping[str, str], now_unix_s: float) -> float | None:
    """Seconds that Retry-After asks to wait; None without one that can be read."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now_unix_s)
    except (ValueError, OverflowError):
        return None


@dataclass(slots=True)
class _Slot:
    begins: float
    requests: int = 0
    retries: int = 0


@dataclass(slots=True)
class Budget:
    """Extra attempts within any ten seconds: a share of the requests in them, and a minimum.

    So a fleet that fails as a whole gets little more than its load, instead of several times it.
    Amounts are requests, or whatever else a request weighs.
    """

    share: float
    min_per_s: float
    _slots: deque[_Slot] = field(default_factory=deque)
    _requests: int = 0
    _retries: int = 0

    def request(self, now: float, amount: int = 1) -> None:
        """One more request came."""
        self._slot(now).requests += amount
        self._requests += amount

    def allows(self, now: float, amount: int = 1) -> bool:
        """Whether one more attempt is within the budget."""
        self._slot(now)
        return self._retries + amount <= self.share * self._requests + self.min_per_s * WINDOW_S

    def take(self, now: float, amount: int = 1) -> bool:
        """Whether one more attempt is allowed; it is counted when it is."""
        if not self.allows(now, amount):
            return False
        self._slots[-1].retries += amount
        self._retries += amount
        return True

    def _slot(self, now: float) -> _Slot:
        slots = self._slots
        while slots and now - slots[0].begins >= WINDOW_S:
            old = slots.popleft()
            self._requests -= old.requests
            self._retries -= old.retries
        if not slots or now - slots[-1].begins >= WINDOW_S / SLOTS:
            slots.append(_Slot(now))
        return slots[-1]
