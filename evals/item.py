"""One request to ask of every arm: a suite's row, a recorded request, a line of a trace.

Knows no scorer and no server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """`body` is an OpenAI request, chat where it has `messages`, else a text completion.

    `cluster` is the conversation or document that the row belongs to, `turn` its place there.
    `expected` is what scorers compare with. `meta`: what else is known; of replays `t_s`, seconds
    since their begin, `tenant` and `session`; of texts `scored_from`, the character that their
    log-probabilities are told from.
    """

    id: str
    cluster: str
    turn: int
    body: Mapping[str, Any]
    expected: Any = None
    tier: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
