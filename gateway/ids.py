"""Random ids that nobody can guess, many drawn at once: a call of the system for each would cost
more than all else of an id. Not for a process that forks."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

TOGETHER = 64


def ids(size_bytes: int) -> Iterator[str]:
    """As hex, without end."""
    digits = 2 * size_bytes
    while True:
        drawn = secrets.token_hex(size_bytes * TOGETHER)
        for at in range(0, len(drawn), digits):
            yield drawn[at : at + digits]
