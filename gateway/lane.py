"""The fast lane: failures of a candidate that need no statistics to end it at once.

Pure: sees observations in the order in which they end, and says why the candidate has to go. What
is subtler than this is judged by whoever steers the rollout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from telemetry import Observation

LATEST = 20  # of the candidate's requests
BASELINE_LATEST = 100
FAILED_MIN, FAILED_SHARE, FAILED_TIMES = 3, 0.2, 2.0
DRAFTED_BEFORE, DRAFTED_MIN, COLLAPSED = 500, 200, 1 / 3  # tokens; of the acceptance before


class Lane:
    """One candidate's latest requests, and the baseline's beside them."""

    def __init__(self, window_s: float, fingerprints: Collection[str] = ()) -> None:
        """`fingerprints`: those that the candidate may answer with; empty: any."""
        self._window_s = window_s
        self._fingerprints = fingerprints
        self._latest: deque[tuple[float, str]] = deque(maxlen=LATEST)  # moments, what was wrong
        self._baseline: deque[tuple[float, str]] = deque(maxlen=BASELINE_LATEST)
        self._drafts: deque[tuple[float, int, int]] = deque()  # moment, accepted, drafted
        self._accepted = self._drafted = 0  # before the window

    def saw(self, seen: Observation, now: float) -> str | None:
        """Why the candidate has to go, after this; None: nothing that shows at once."""
        if seen.arm != "candidate":
            self._baseline.append((now, wrong(seen)))
            return None
        if seen.fingerprint and self._fingerprints and seen.fingerprint not in self._fingerprints:
            return f"an answer has the fingerprint {seen.fingerprint}, which is not the candidate's"
        self._latest.append((now, wrong(seen)))
        return self._failures(now) or self._acceptance(seen, now)

    def _failures(self, now: float) -> str | None:
        latest = self._within(self._latest, now)
        failures = [what for what in latest if what]
        if len(failures) < FAILED_MIN:
            return None
        share = len(failures) / len(latest)
        before = self._within(self._baseline, now)
        usual = sum(map(bool, before)) / len(before) if before else 0.0
        if share < FAILED_SHARE or share < FAILED_TIMES * usual:
            return None
        kinds = ", ".join(sorted(set(failures)))
        return f"{len(failures)} of its last {len(latest)} answers failed: {kinds}"

    def _within(self, seen: Iterable[tuple[float, str]], now: float) -> list[str]:
        return [what for at, what in seen if at > now - self._window_s]

    def _acceptance(self, seen: Observation, now: float) -> str | None:
        """Speculation that was worth it before, and is not any more."""
        if seen.accepted_tokens is None or seen.rejected_tokens is None:
            return None
        drafted = seen.accepted_tokens + seen.rejected_tokens
        self._drafts.append((now, seen.accepted_tokens, drafted))
        while self._drafts[0][0] <= now - self._window_s:
            _, accepted, drafted = self._drafts.popleft()
            self._accepted += accepted
            self._drafted += drafted
        recent = sum(one[2] for one in self._drafts)
        if self._drafted < DRAFTED_BEFORE or recent < DRAFTED_MIN:
            return None
        before = self._accepted / self._drafted
        share = sum(one[1] for one in self._drafts) / recent
        if share >= COLLAPSED * before:
            return None
        return f"{share:.0%} of drafted tokens are accepted of late, after {before:.0%}"


def wrong(seen: Observation) -> str:
    """In a word; "" for an answer that shows nothing, and where the client is to blame."""
    if seen.outcome in ("error", "timeout"):
        return "broken stream" if seen.status == 200 else f"{seen.outcome} {seen.status}"
    return seen.problem if seen.scores.get("bad_output") else ""
