"""What a step costs: measured at the start, corrected by every step that runs.

Knows numbers of tokens and seconds; knows no model. A step's time is taken as that of its tokens
without context (a table over their number) and of the context that they look at: for each decode
the tokens of its sequence, for each chunk its tokens times those before them. A sequence that
verifies guesses is a decode, and costs more for being a span and for what its guesses look at.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

# A correction's share of what a step took more or less than expected. A descheduled process gives
# single steps that say nothing, so one step counts little and never for more than a factor of two.
LEARNING = 0.1
# Of a size that few steps have had, each counts more: what was measured at the start counts as one.
_SEEN_AT_START = 1.0
_RATIO_MAX = 2.0


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a step does: `decode_context`, `chunk_pairs` and `guess_context` are what its decodes,
    chunks and guesses look at, `spans` how many sequences verify guesses."""

    tokens: int
    decode_context: int = 0
    chunk_pairs: int = 0
    spans: int = 0
    guess_context: int = 0


def pairs(count: int, before: int) -> int:
    """Query-key pairs of a chunk of `count` tokens behind `before` others."""
    return count * before + count * (count + 1) // 2


class StepCosts:
    """Seconds of a step by its size. `sizes` are token counts, ascending, `seconds` theirs."""

    def __init__(
        self,
        sizes: list[int],
        seconds: list[float],
        *,
        decode_token_s: float = 0.0,
        chunk_pair_s: float = 0.0,
        span_s: float = 0.0,
        guess_token_s: float = 0.0,
    ) -> None:
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError(f"sizes of a cost table ascend from 1, got {sizes}")
        if len(sizes) != len(seconds) or min(seconds) <= 0:
            raise ValueError("a cost table needs a positive time for each size")
        self.sizes = sizes
        self.seconds = list(seconds)
        self.decode_token_s = max(decode_token_s, 0.0)
        self.chunk_pair_s = max(chunk_pair_s, 0.0)
        self.span_s = max(span_s, 0.0)
        self.guess_token_s = max(guess_token_s, 0.0)
        self._seen = [_SEEN_AT_START] * len(sizes)
        self._make_monotone()

    def estimate(self, size: StepSize) -> float:
        """Seconds that a step of this size takes."""
        return self._of_tokens(size.tokens) + self._of_context(size)

    def growing(self, size: StepSize, context: int) -> Iterator[float]:
        """Seconds of a step of this size, then of those with 1, 2, ... guesses more, each of which
        looks at `context` tokens; spans do not become more."""
        sizes, seconds, last = self.sizes, self.seconds, len(self.sizes) - 1
        more_s = self.guess_token_s * context
        beside_s = self._of_context(size)
        at, tokens = min(bisect_left(sizes, size.tokens), last), size.tokens
        while True:
            while at < last and sizes[at] < tokens:
                at += 1
            above, top = sizes[at], seconds[at]
            if tokens > above:
                yield beside_s + top * tokens / above
            elif at == 0 or tokens == above:
                yield beside_s + top
            else:
                below, low = sizes[at - 1], seconds[at - 1]
                yield beside_s + low + (top - low) * (tokens - below) / (above - below)
            tokens += 1
            beside_s += more_s

    def prefill_s(self, tokens: int, before: int = 0) -> float:
        """Seconds that a prompt of `tokens` takes behind `before` others, by the cheapest steps."""
        largest = self.sizes[-1]
        steps, rest = divmod(tokens, largest)
        table = steps * self.seconds[-1] + (self._of_tokens(rest) if rest else 0.0)
        return table + self.chunk_pair_s * pairs(tokens, before)

    def largest_chunk(self, allowed_s: float, beside: StepSize, before: int, most: int) -> int:
        """How many tokens behind `before` others fit into a step beside the rest of it.

        0 when not even one does. Cost grows with the count, so halving finds it.
        """
        low, high = 0, most
        while low < high:
            count = (low + high + 1) // 2
            step = StepSize(
                beside.tokens + count,
                beside.decode_context,
                beside.chunk_pairs + pairs(count, before),
            )
            low, high = (count, high) if self.estimate(step) <= allowed_s else (low, count - 1)
        return low

    def observe(self, size: StepSize, seconds: float) -> None:
        """Moves what the step was made of towards what it took, each part by its share."""
        expected = self.estimate(size)
        if expected <= 0 or seconds <= 0:
            return
        ratio = min(max(seconds / expected, 1 / _RATIO_MAX), _RATIO_MAX)
        weights = list(self._weights(size.tokens))
        share = sum(weight * self.seconds[at] for at, weight in weights) / expected
        for at, weight in weights:
            self._seen[at] += weight
            learning = max(LEARNING, weight / self._seen[at])
            self.seconds[at] *= ratio ** (learning * share * weight)

        def moved(each_s: float, count: int) -> float:
            changed: float = ratio ** (LEARNING * each_s * count / expected)
            return each_s * changed

        self.decode_token_s = moved(self.decode_token_s, size.decode_context)
        self.chunk_pair_s = moved(self.chunk_pair_s, size.chunk_pairs)
        self.span_s = moved(self.span_s, size.spans)
        self.guess_token_s = moved(self.guess_token_s, size.guess_context)
        self._make_monotone(around=weights[0][0])

    def _of_context(self, size: StepSize) -> float:
        seconds = self.decode_token_s * size.decode_context + self.chunk_pair_s * size.chunk_pairs
        return seconds + self.span_s * size.spans + self.guess_token_s * size.guess_context

    def _of_tokens(self, tokens: int) -> float:
        largest = self.sizes[-1]
        if tokens > largest:
            return self.seconds[-1] * tokens / largest
        return sum(weight * self.seconds[at] for at, weight in self._weights(tokens))

    def _weights(self, tokens: int) -> Iterator[tuple[int, float]]:
        """The table's entries around a number of tokens, with their linear weights."""
        at = bisect_left(self.sizes, tokens)
        if at == len(self.sizes) or self.sizes[at] == tokens or at == 0:
            yield min(at, len(self.sizes) - 1), 1.0
            return
        below, above = self.sizes[at - 1], self.sizes[at]
        share = (tokens - below) / (above - below)
        yield at - 1, 1.0 - share
        yield at, share

    def _make_monotone(self, around: int | None = None) -> None:
        """More tokens never cost less: what was just corrected carries its neighbours along."""
        if around is not None:
            for at in range(around - 1, -1, -1):
                self.seconds[at] = min(self.seconds[at], self.seconds[at + 1])
        for at in range(1, len(self.seconds)):
            self.seconds[at] = max(self.seconds[at], self.seconds[at - 1])
