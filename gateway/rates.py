"""What a replica shows of its speed: learned from first tokens, with how wrong it has been.

    first token after  =  fixed + work ahead * s_per_token + requests under way * s_per_answer

Seconds a token come from work alone: what was computed between one first token and the next, over
the time that passed, so that a wrong guess of what waits cannot spoil them. The rest is fitted to
what they leave. Older observations weigh less. Knows seconds and tokens; no clock and no requests.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

FIRST_S_PER_TOKEN = 1 / 4000  # until something was seen
FIRST_S_PER_ANSWER = 0.0005
FIRST_TOKENS = 500.0  # that the first guess weighs
FORGET = 0.98  # what an observation weighs when the next one comes
RIDGE = 20.0  # squared requests: how well the first guess of a request's cost is believed
S_PER_ANSWER_MIN, S_PER_ANSWER_MAX = 1e-5, 0.1  # requests under way never count as nothing
CLIP, CLIP_S = 10.0, 1.0  # an observation counts as no slower than this times what is known
FLOOR_S = 0.05  # differences below are no mistakes
ERROR_WEIGHT = 0.05  # of the latest mistake
SEEN_MIN = 20  # observations before a model can be told to be wrong
WRONG = math.log(4)  # off by this factor, as the mean of logarithms
BUSY_S = 30.0  # over which the share of busy time is taken
LATEST = 128  # prompts
EVIDENCE = 12  # of them, before anything is common
SHARED = 0.3  # of them
DEPTHS = tuple(sorted({int(1.25**power) for power in range(42)}))  # blocks, to about 10,000


@dataclass(slots=True)
class Pace:
    """The learned line of one replica."""

    fixed_s: float = 0.0
    s_per_answer: float = FIRST_S_PER_ANSWER
    seen: int = 0
    error: float = 0.0  # mean of |log(seen / foreseen)|
    _tokens: float = FIRST_TOKENS
    _time_s: float = FIRST_TOKENS * FIRST_S_PER_TOKEN
    # Decayed sums: of 1, of requests, of their squares, of what is left to explain, by requests.
    _fit: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)

    @property
    def s_per_token(self) -> float:
        return self._time_s / self._tokens

    def foresee_s(self, ahead_tokens: float, answers: float) -> float:
        """When a first token will come, with so much to compute until then."""
        return self.fixed_s + ahead_tokens * self.s_per_token + answers * self.s_per_answer

    def learn(
        self, tokens: float, took_s: float, ahead_tokens: float, answers: float, ttft_s: float
    ) -> None:
        """One first token. `tokens` were computed for it, in `took_s` since the one before or since
        it was sent; `ahead_tokens` are these and what was before them."""
        foreseen_s = self.foresee_s(ahead_tokens, answers)
        mistake = abs(math.log(max(ttft_s, FLOOR_S) / max(foreseen_s, FLOOR_S)))
        self.seen += 1
        self.error += max(ERROR_WEIGHT, 1 / self.seen) * (mistake - self.error)
        most_s = CLIP * tokens * self.s_per_token + CLIP_S
        self._tokens = FORGET * self._tokens + tokens
        self._time_s = FORGET * self._time_s + min(took_s, most_s)
        self._explain(answers, min(ttft_s, CLIP * foreseen_s + CLIP_S), ahead_tokens)

    @property
    def factor(self) -> float:
        """By how much predictions are off, typically; 1.0: not at all."""
        return math.exp(min(self.error, 50.0))

    @property
    def wrong(self) -> bool:
        return self.seen >= SEEN_MIN and self.error > WRONG

    def _explain(self, answers: float, ttft_s: float, ahead_tokens: float) -> None:
        """Fits what tokens do not explain by least squares; the first guess is believed a bit."""
        left_s = ttft_s - ahead_tokens * self.s_per_token
        new = (1.0, answers, answers * answers, left_s, answers * left_s)
        self._fit = tuple(FORGET * was + now for was, now in zip(self._fit, new, strict=True))  # type: ignore[assignment]  # still five
        one, n, nn, r, nr = self._fit
        over = nn - n * n / one + RIDGE
        slope = (nr - n * r / one + RIDGE * FIRST_S_PER_ANSWER) / over
        self.s_per_answer = min(max(slope, S_PER_ANSWER_MIN), S_PER_ANSWER_MAX)
        self.fixed_s = max(0.0, (r - self.s_per_answer * n) / one)


@dataclass(slots=True)
class Work:
    """Prompts that were sent to a replica and have no first token yet."""

    booked: dict[int, float] = field(default_factory=dict)  # tokens to compute, by booking
    _began: float = 0.0  # since when a first token of them can be due
    _first_at: float = -math.inf  # when the latest first token came
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

    def first_token(self, began: float, now: float) -> float:
        """Seconds since the first token before, or since this prompt was sent."""
        took_s = now - max(began, self._first_at)
        self._first_at = now
        return took_s

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
