"""The circuit of one replica: closed, open, half open. Pure: time is an argument, nothing waits.

Only what a replica did wrong counts. A long generation, a client that left, and a refusal that the
client brought on itself are no failures; they end a trial without a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from policies.retrying import Breaker

BACKOFF_MAX = 8  # times open_s, after trials that failed

State = Literal["closed", "open", "half_open"]


@dataclass(slots=True)
class Counts:
    """Requests and failures of half a window."""

    since: float = float("-inf")
    requests: int = 0
    failures: int = 0


@dataclass(slots=True)
class Circuit:
    """Closed: everything passes. Open: nothing until `trial_at`, then one, and after open_s another
    if that one still runs: a trial may be a long generation, or be lost."""

    policy: Breaker
    in_a_row: int = 0
    trial_at: float | None = None  # None: closed
    trying: bool = False
    opened: int = 0  # times in a row, without a success in between
    recent: Counts = field(default_factory=Counts)
    before: Counts = field(default_factory=Counts)

    def state(self, now: float) -> State:
        if self.trial_at is None:
            return "closed"
        return "half_open" if self.trying or now >= self.trial_at else "open"

    def allows(self, now: float) -> bool:
        """Whether a request may be sent now."""
        return self.trial_at is None or now >= self.trial_at

    def wait_s(self, now: float) -> float:
        """How long until the next trial may be; 0 when it may be now."""
        return max(0.0, self.trial_at - now) if self.trial_at is not None else 0.0

    def begin(self, now: float) -> bool:
        """A request is being sent. True when it is a trial, to be told with its outcome."""
        if self.trial_at is None:
            return False
        self.trial_at = now + self.policy.open_s
        self.trying = True
        return True

    def succeeded(self, now: float, *, trial: bool) -> None:
        """An answer came. Of an open circuit only a trial's counts: others began before."""
        if self.trial_at is None:
            self.in_a_row = self.opened = 0
            self._count(now, failed=False)
        elif trial:
            self.trial_at, self.trying = None, False
            self.in_a_row = 0
            self.recent, self.before = Counts(now), Counts()

    def failed(self, now: float, *, trial: bool) -> None:
        """The replica failed at a request."""
        if self.trial_at is not None:
            if trial:
                self._open(now)
            return
        self.in_a_row += 1
        self._count(now, failed=True)
        requests = self.recent.requests + self.before.requests
        failures = self.recent.failures + self.before.failures
        often = requests >= self.policy.min_requests and failures >= self.policy.share * requests
        if self.in_a_row >= self.policy.failures or often:
            self._open(now)

    def ended(self, now: float, *, trial: bool) -> None:
        """A request ended that says nothing of the replica: the next one may be the trial."""
        if trial and self.trial_at is not None:
            self.trial_at, self.trying = now, False

    def _open(self, now: float) -> None:
        factor = min(2**self.opened, BACKOFF_MAX)
        self.opened = min(self.opened + 1, BACKOFF_MAX)
        self.trial_at = now + self.policy.open_s * factor
        self.trying = False

    def _count(self, now: float, *, failed: bool) -> None:
        half_s = self.policy.window_s / 2
        if now - self.recent.since >= half_s:
            stale = now - self.recent.since >= 2 * half_s
            self.before = Counts() if stale else self.recent
            self.recent = Counts(now)
        self.recent.requests += 1
        self.recent.failures += failed
