"""Why a request went where it went: every decision with all that it was made of, kept for a while.

Numbers, names of models, tiers and replicas; no text of a prompt or an answer. A receipt is told as
JSON, from which explain.py decides again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

from gateway.ids import ids
from gateway.ladder import Foreseen
from gateway.route import Ask, Choice, Option
from gateway.trim import Cut, Trimmed

_ids = ids(8)


@dataclass(slots=True)
class Tried:
    """One attempt, as it ended."""

    url: str
    outcome: str
    after_s: float


@dataclass(slots=True)
class Decision:
    """One choice among replicas."""

    ask: Ask
    options: tuple[Option, ...]
    choice: Choice


@dataclass(frozen=True, slots=True)
class Left:
    """What trimming left out of the prompt before it was routed, in tokens, by the rule that did.
    Of a prompt that was cut into, messages [start, end) and [inner_start, inner_end) are gone."""

    before_tokens: int
    after_tokens: int
    tool_output_tokens: int  # gateway.trim.tool_output_chars
    passage_tokens: int  # gateway.trim.passages
    round_tokens: int  # gateway.trim.drop
    again_tokens: int  # of those that stayed, prefilled again since the cut moved
    cut: Cut

    @classmethod
    def of(cls, trimmed: Trimmed, after_tokens: int) -> Left:
        return cls(
            after_tokens + trimmed.removed_tokens,
            after_tokens,
            trimmed.tool_output_tokens,
            trimmed.passage_tokens,
            trimmed.round_tokens,
            trimmed.again_tokens,
            trimmed.cut,
        )


@dataclass(slots=True)
class Receipt:
    """One request. Filled while it goes on."""

    id: str
    at: float  # seconds since 1970
    tenant: str
    model: str
    tier: str
    prompt_tokens: int
    exact: bool
    trimmed: Left | None = None
    decisions: list[Decision] = field(default_factory=list)
    attempts: list[Tried] = field(default_factory=list)
    foreseen: Foreseen | None = None
    foreseen_ttft_s: float | None = None
    error_factor: float | None = None  # by which predictions for that replica were off by then
    ttft_s: float | None = None
    told_prompt_tokens: int | None = None
    told_cached_tokens: int | None = None

    def payload(self) -> dict[str, Any]:
        """As JSON, all of it."""
        return asdict(self)


class Receipts:
    """The latest ones, by their ids."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[str, Receipt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, receipt: Receipt) -> None:
        self._kept[receipt.id] = receipt
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def get(self, name: str) -> Receipt | None:
        return self._kept.get(name)

    def latest(self, tenant: str | None) -> list[Receipt]:
        """All of a tenant that are kept; None: of all of them."""
        return [one for one in self._kept.values() if tenant in (None, one.tenant)]


def new_id() -> str:
    return f"rcpt_{next(_ids)}"
