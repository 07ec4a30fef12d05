"""What a worker tells a gateway of its own share of a request's time, beside the answer.

A whole answer has it as `Server-Timing`, and so has a refusal; in a stream, whose header goes
before anything has run, it is an SSE comment before the first event, and one before the end. Only
who asks for it by a header gets the comments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TIMING_HEADER = "x-headgate-timing"
TIMING = b": timing "
_COMMENT = re.compile(rb": timing ([0-9.]{1,20}),([0-9.]{1,20}),([0-9.]{1,20})\n\n")
_DURATION = re.compile(r"([a-z_]{1,20});dur=([0-9]{1,12}(?:\.[0-9]{1,9})?)")


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds that a request waited, that its prompt took, and the rest of its answer."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def comment(self) -> bytes:
        """In milliseconds."""
        told = (1000 * self.queue_s, 1000 * self.prefill_s, 1000 * self.decode_s)
        return TIMING + b"%.3f,%.3f,%.3f\n\n" % told

    def header(self) -> str:
        """As `Server-Timing`."""
        return (
            f"replica_queue;dur={1000 * self.queue_s:.3f}, "
            f"prefill;dur={1000 * self.prefill_s:.3f}, decode;dur={1000 * self.decode_s:.3f}"
        )


def of_header(text: str) -> Phases | None:
    """None for a `Server-Timing` that is not of a worker of ours."""
    found = {name: float(ms) / 1000 for name, ms in _DURATION.findall(text)}
    if "replica_queue" not in found:
        return None
    return Phases(found["replica_queue"], found.get("prefill", 0.0), found.get("decode", 0.0))


def cut(piece: bytes) -> tuple[bytes, Phases | None]:
    """A piece of a stream without the comment, and what that told."""
    found = _COMMENT.search(piece)
    if found is None:
        return piece, None
    try:
        queue_ms, prefill_ms, decode_ms = map(float, found.groups())
    except ValueError:
        return piece, None
    told = Phases(queue_ms / 1000, prefill_ms / 1000, decode_ms / 1000)
    return piece[: found.start()] + piece[found.end() :], told
