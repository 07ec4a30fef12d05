"""What an answer says that it took, read from the last bytes that went to the client."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Inside a JSON string every quote is escaped, so that no answer's text looks like this.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_COUNT = re.compile(rb'"([a-z_]{1,40}_tokens)"\s*:\s*([0-9]{1,12})')


@dataclass(slots=True)
class Usage:
    """Tokens of one request, as its replica counted them."""

    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int | None  # of the prompt, that the replica had already; None: it does not say
    total_tokens: int | None = None
    accepted_tokens: int | None = None  # of the answer, that a draft had guessed
    rejected_tokens: int | None = None  # that were guessed in vain


def usage_of(pieces: Iterable[bytes]) -> Usage | None:
    """The last `usage` in the pieces of a stream's end or of a body; None where there is none."""
    text = b"".join(pieces)
    at = text.rfind(b'"usage"')
    while at >= 0 and not _USAGE.match(text, at):  # a null, or the name of something else
        at = text.rfind(b'"usage"', 0, at)
    if at < 0:
        return None
    counts = dict(_COUNT.findall(text, at))
    if b"prompt_tokens" not in counts:
        return None

    def count(name: bytes) -> int | None:
        return int(counts[name]) if name in counts else None

    return Usage(
        int(counts[b"prompt_tokens"]),
        count(b"completion_tokens") or 0,
        count(b"cached_tokens"),
        count(b"total_tokens"),
        count(b"accepted_prediction_tokens"),
        count(b"rejected_prediction_tokens"),
    )
