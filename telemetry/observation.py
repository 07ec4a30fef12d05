"""One observed request: what gateway and evals tell each other, and what every judgement counts.

Knows no service and no statistics; both sides of a pair, live traffic and replays are rows of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Outcome = Literal["ok", "error", "timeout", "refused", "cancelled"]
FROM_CACHE = "response_cache"  # an Observation's replica where the gateway gave an answer again


@dataclass(frozen=True, slots=True)
class Observation:
    """One request as one arm answered it. Times in seconds; what is not known is None.

    `id` is the same in every arm: it makes the pair. `source` is `suite:NAME`, `replay:NAME` or
    `live`. A request that failed stays: `outcome` says how, and it counts as wrong and as late.
    """

    id: str
    source: str
    arm: str
    cluster: str  # conversation or document: the unit of inference
    block: int = 0
    repeat: int = 0
    tier: str = ""
    tenant: str = ""
    turn: int = 0  # of its conversation, from 0
    at_s: float = 0.0  # when it was sent, since the run began; live: since 1970
    outcome: Outcome = "ok"
    status: int = 200
    problem: str = ""  # what went wrong, in words
    ttft_s: float | None = None
    tpot_s: float | None = None
    gap_max_s: float | None = None  # longest time between two tokens
    e2e_s: float | None = None
    ttft_target_s: float | None = None  # of its tier, where there are targets
    tpot_target_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    trimmed_tokens: int | None = None
    completion_tokens: int | None = None
    max_tokens: int | None = None
    accepted_tokens: int | None = None  # of those that a draft guessed
    rejected_tokens: int | None = None
    finish_reason: str = ""
    text: str = ""  # "" in live observations: no text leaves a gateway by this way
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    token_ids: tuple[int, ...] | None = None  # where the server tells them
    logprobs: tuple[float, ...] | None = None
    fingerprint: str = ""
    replica: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)  # by scorer, each in [0, 1]

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    def payload(self) -> dict[str, Any]:
        """As JSON, without what is at its default."""
        whole = asdict(self)
        return {
            one.name: whole[one.name]
            for one in fields(self)
            if one.name in _ALWAYS or whole[one.name] != _DEFAULTS[one.name]
        }

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> Observation:
        """From `payload`. Raises TypeError for fields that there are none of, or too few."""
        given = dict(payload)
        for name in ("token_ids", "logprobs", "tool_calls"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        return cls(**given)


_ALWAYS = ("id", "source", "arm", "cluster")
_DEFAULTS: dict[str, Any] = {
    one.name: {} if one.name == "scores" else one.default for one in fields(Observation)
}
