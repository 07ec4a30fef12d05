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
    counts = {name: int(count) for name, count in _COUNT.findall(text, at)}
    if b"prompt_tokens" not in counts:
        return None
    return Usage(
        counts[b"prompt_tokens"],
        counts.get(b"completion_tokens", 0),
        counts.get(b"cached_tokens"),
        counts.get(b"total_tokens"),
        counts.get(b"accepted_prediction_tokens"),
        counts.get(b"rejected_prediction_tokens"),
    )
