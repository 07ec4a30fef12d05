"""What a replica shows of its speed: learned from first tokens, with how wrong it has been.

    first token after  =  fixed + work ahead * s_per_token + requests under way * s_per_answer

by recursive least squares with forgetting (Ljung, System Identification, 11.2). Knows seconds and
tokens; no clock, replicas or requests.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

FIRST_S_PER_TOKEN = 1 / 4000  # until something was seen
FIRST_S_PER_ANSWER = 0.0005
FORGET = 0.98  # what an observation weighs when the next one comes
SPREAD = (0.02, 1e-3, 1e-2)  # how far the first guesses may be off: fixed, per token, per answer
S_PER_TOKEN_MIN = 1e-7
S_PER_ANSWER_MIN = 1e-5  # requests under way never count as nothing
CLIP = 3.0  # a first token counts as no later than this times what was foreseen, and CLIP_S
CLIP_S = 0.5
FLOOR_S = 0.05  # differences below are no mistakes
ERROR_WEIGHT = 0.05  # of the latest mistake
SEEN_MIN = 20  # observations before a model can be told to be wrong
WRONG = math.log(4)  # off by this factor, as the mean of logarithms
BUSY_S = 30.0  # over which the share of busy time is taken
LATEST = 128  # prompts
EVIDENCE = 12  # of them, before anything is common
SHARED = 0.3  # of them
DEPTHS = tuple(sorted({int(1.25**power) for power in range(42)}))  # blocks, to about 10,000


def _first_spread() -> list[list[float]]:
    return [[SPREAD[row] ** 2 if row == at else 0.0 for at in range(3)] for row in range(3)]


@dataclass(slots=True)
class Pace:
    """The learned line of one replica."""

    fixed_s: float = 0.0
    s_per_token: float = FIRST_S_PER_TOKEN
    s_per_answer: float = FIRST_S_PER_ANSWER
    seen: int = 0
    error: float = 0.0  # mean of |log(seen / foreseen)|
    _spread: list[list[float]] = field(default_factory=_first_spread, repr=False)

    def foresee_s(self, ahead_tokens: float, answers: int) -> float:
        return self.fixed_s + ahead_tokens * self.s_per_token + answers * self.s_per_answer

    def learn(self, ahead_tokens: float, answers: int, ttft_s: float) -> None:
        """One first token: what had to be computed until it came, and beside how many answers."""
        foreseen_s = self.foresee_s(ahead_tokens, answers)
        mistake = abs(math.log(max(ttft_s, FLOOR_S) / max(foreseen_s, FLOOR_S)))
        self.seen += 1
        self.error += max(ERROR_WEIGHT, 1 / self.seen) * (mistake - self.error)
        clipped_s = min(ttft_s, CLIP * foreseen_s + CLIP_S)
        self._update((1.0, ahead_tokens, float(answers)), clipped_s - foreseen_s)

    @property
    def factor(self) -> float:
        """By how much predictions are off, typically; 1.0: not at all."""
        return math.exp(self.error)

    @property
    def wrong(self) -> bool:
        return self.seen >= SEEN_MIN and self.error > WRONG

    def _update(self, x: tuple[float, float, float], residual_s: float) -> None:
        p = self._spread
        px = [sum(row[at] * x[at] for at in range(3)) for row in p]
        total = FORGET + sum(x[at] * px[at] for at in range(3))
        gain = [one / total for one in px]
        self.fixed_s = max(0.0, self.fixed_s + gain[0] * residual_s)
        self.s_per_token = max(S_PER_TOKEN_MIN, self.s_per_token + gain[1] * residual_s)
        self.s_per_answer = max(S_PER_ANSWER_MIN, self.s_per_answer + gain[2] * residual_s)
        for row in range(3):
            for column in range(3):
                p[row][column] = (p[row][column] - gain[row] * px[column]) / FORGET
            # What is not exercised would be forgotten without end.
            p[row][row] = min(p[row][row], SPREAD[row] ** 2)


@dataclass(slots=True)
class Work:
    """Prompts that were sent to a replica and have no first token yet."""

    booked: dict[int, float] = field(default_factory=dict)  # tokens to compute, by booking
    _began: float = 0.0  # since when a first token of them can be due
    _next: int = 0
    _busy: float = 0.0
    _busy_at: float = 0.0

    def waiting_tokens(self, now: float, s_per_token: float) -> float:
        """What is still to be computed, less what time has covered since the last first token."""
        if not self.booked:
            return 0.0
        return max(0.0, sum(self.booked.values()) - max(0.0, now - self._began) / s_per_token)

    def book(self, tokens: float, now: float) -> int:
        if not self.booked:
            self._began = now
        self._next += 1
        self.booked[self._next] = tokens
        return self._next

    def release(self, booking: int, now: float) -> None:
        """Its first token has come, or it has ended without. Twice is once."""
        if self.booked.pop(booking, None) is not None:
            self._began = now

    def computed(self, took_s: float, now: float) -> None:
        self._busy = self.busy(now) + took_s / BUSY_S
        self._busy_at = now

    def busy(self, now: float) -> float:
        """The share of the last BUSY_S that was computed, older times fading."""
        share = self._busy * math.exp(-max(0.0, now - self._busy_at) / BUSY_S)
        return min(1.0, share)


@dataclass(slots=True)
class Common:
    """Which beginnings the latest prompts of a model share.

    What so many have will soon be held by every replica, and says nothing about where to go. In a
    real trace all conversations share their first block, and would otherwise all go to one replica.
    """

    window: deque[tuple[bytes, ...]] = field(default_factory=deque)
    counts: dict[bytes, int] = field(default_factory=dict)
    ends: deque[bytes] = field(default_factory=lambda: deque(maxlen=8))

    def depth(self, hashes: tuple[bytes, ...]) -> int:
        """Leading blocks that at least SHARED of the latest prompts begin with, roughly."""
        found = 0
        if len(self.window) >= EVIDENCE:
            least = SHARED * len(self.window)
            for depth in DEPTHS:
                if depth > len(hashes) or self.counts.get(hashes[depth - 1], 0) < least:
                    break
                found = depth
        return found

    def saw(self, hashes: tuple[bytes, ...]) -> None:
        """Prompts that come together and are equal count once: they are one work, not many."""
        if not hashes or hashes[-1] in self.ends:
            return
        self.ends.append(hashes[-1])
        marks = tuple(hashes[depth - 1] for depth in DEPTHS if depth <= len(hashes))
        self.window.append(marks)
        for one in marks:
            self.counts[one] = self.counts.get(one, 0) + 1
        if len(self.window) > LATEST:
            for one in self.window.popleft():
                self.counts[one] -= 1
                if not self.counts[one]:
                    del self.counts[one]
