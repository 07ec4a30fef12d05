"""What the replicas of a model can take at once, learned from how they answer. Pure.

Prompts: as many as are read within a fraction of the tightest target, by the rate at which first
tokens have come while requests waited. Sequences: as many as the replicas are known to hold, fewer
while tokens come slower than promised. So what waits, waits here, where it is ordered.
"""

from __future__ import annotations

import math

from gateway.queues import Room

WINDOW_S = 0.5
BUSY_S = 0.02  # the least of a window that says anything
READ_AHEAD = 1.5  # more than what is read within the wait, so that no replica runs dry
PROMPTS_EACH = (
    2  # prompts that a replica may always have: one is read, one is there when it is done
)
WAIT_SHARE = 0.25  # of a target for the first token, that a prompt may wait at a replica
WAIT_MAX_S = 1.0
STEP_S = 1.0  # between changes of the share of places
SLOWER = 1.5  # than the fastest ever seen: no target below that is worth giving places up for


class Capacity:
    """What has been learned of one set of replicas."""

    def __init__(self) -> None:
        self.rate: float | None = None  # prompt tokens a second, all replicas together
        self.share = 1.0  # of their places that are used
        self._began = -math.inf
        self._tokens = 0
        self._busy_s = 0.0
        self._busy_since: float | None = None
        self._waited = True  # others did, at every first token of this window
        self._pressure = 0.0  # time per token, as a multiple of what was promised
        self._fastest_s = math.inf
        self._changed = -math.inf

    def room(self, places: list[int], target_s: float | None, *, ordered: bool = True) -> Room:
        """`places`: sequences of each replica that is well; `target_s`: the tightest first token's
        among the tiers that are asked for; `ordered`: replicas know what is urgent."""
        if not places:
            return Room(0)
        wait_s = WAIT_MAX_S if target_s is None else min(WAIT_SHARE * target_s, WAIT_MAX_S)
        tokens = math.inf if self.rate is None else READ_AHEAD * self.rate * wait_s
        used = max(len(places), math.floor(sum(places) * self.share))
        return Room(used, PROMPTS_EACH * len(places), tokens, ordered)

    def reading(self, now: float) -> None:
        """A prompt is on its way, where none was."""
        if self._busy_since is None:
            self._busy_since = now

    def read(self, tokens: int, now: float, *, waiting: bool, idle: bool) -> None:
        """A first token has come; `waiting`: others wait here, `idle`: no prompt is left there."""
        self._tokens += tokens
        self._waited = self._waited and waiting
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None if idle else now
        if now - self._began < WINDOW_S:
            return
        if self._busy_s >= BUSY_S:
            seen = self._tokens / self._busy_s
            if self._waited:
                self.rate = seen if self.rate is None else self.rate + 0.3 * (seen - self.rate)
            elif self.rate is not None:  # without a queue, replicas may have had too little to do
                self.rate = max(self.rate, seen)
        self._began, self._tokens, self._busy_s, self._waited = now, 0, 0.0, True

    def left(self, now: float, *, idle: bool) -> None:
        """A prompt that was on its way is gone without a token."""
        if idle and self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None

    def answered(self, tpot_s: float, target_s: float, now: float, *, full: bool) -> None:
        """An answer's time per token, and its target; `full`: its replicas had no place left."""
        self._fastest_s = min(self._fastest_s, tpot_s)
        ratio = tpot_s / max(target_s, SLOWER * self._fastest_s)
        self._pressure += 0.1 * (ratio - self._pressure)
        if now - self._changed < STEP_S:
            return
        if self._pressure > 1 and full:
            self.share = max(0.05, 0.9 * self.share)
            self._changed = now
        elif self._pressure < 0.8 and self.share < 1:
            self.share = min(1.0, self.share + 0.02)
            self._changed = now
