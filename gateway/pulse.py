"""How evenly a stream goes to its client: first token, gaps between reads, stalls, bytes in vain.

Knows moments and sizes of chunks, and of what is in them whether it says something.
"""

from __future__ import annotations

import re
from statistics import median

# The first piece of an answer itself: a role alone says nothing. Inside a JSON string a quote is
# escaped, so that no answer's text looks like this.
SAYS = re.compile(
    rb'"(?:content|text|reasoning_content|reasoning|refusal)"\s*:\s*"[^"]|"tool_calls"\s*:\s*\[\s*{'
)
STALL_TIMES, STALL_MIN_S = 5.0, 0.05  # of the answer's median gap, and at least so long
GAPS_MAX = 4096  # that are judged together


class Pulse:
    """One stream. A pause that the client asks for is no gap of it."""

    __slots__ = (
        "_gaps", "_judged", "_stalls", "bytes", "bytes_when_left", "first_at", "last_at",
        "longest_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.bytes = 0
        self.bytes_when_left: int | None = None
        self.first_at: float | None = None
        self.last_at = 0.0
        self.longest_s: float | None = None
        self._gaps: list[float] = []
        self._judged = 0  # gaps that are gone
        self._stalls = 0

    def beat(self, chunk: bytes, since: float, now: float) -> None:
        """A read's bytes go to the client, `since` the ones before went or it could take more."""
        self.bytes += len(chunk)
        if self.first_at is None:
            if SAYS.search(chunk) is None:
                return
            self.first_at = now
        else:
            self._gaps.append(now - since)
            if len(self._gaps) >= GAPS_MAX:
                self._judge()
        self.last_at = now

    def left(self) -> None:
        """The client has gone: whatever comes now comes in vain."""
        self.bytes_when_left = self.bytes

    @property
    def bytes_in_vain(self) -> int:
        return 0 if self.bytes_when_left is None else self.bytes - self.bytes_when_left

    @property
    def pieces(self) -> int:
        """Reads from the first one on that said something."""
        return 0 if self.first_at is None else 1 + self._judged + len(self._gaps)

    def stalls(self) -> int:
        """Gaps so far that were far longer than the answer's usual ones."""
        self._judge()
        return self._stalls

    def _judge(self) -> None:
        gaps = self._gaps
        if not gaps:
            return
        longest_s = max(gaps)
        self.longest_s = max(self.longest_s or 0.0, longest_s)
        if longest_s >= STALL_MIN_S:
            limit_s = max(STALL_MIN_S, STALL_TIMES * median(gaps))
            self._stalls += sum(gap > limit_s for gap in gaps)
        self._judged += len(gaps)
        gaps.clear()
