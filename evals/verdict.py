"""What a gate found, and what it decided: the one value that reports, ledger and rollouts read.

Knows no statistics and no files; `verdict_file.py` reads and writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from policies.side import Side

__all__ = ["EXIT_CODES", "USAGE_EXIT", "Control", "Decision", "Finding", "Side", "Verdict"]

SCHEMA = 1

Decision = Literal["pass", "fail", "inconclusive", "invalid", "no_benefit"]
# What `headgate gate run` and its siblings exit with.
EXIT_CODES: Mapping[str, int] = {
    "pass": 0, "fail": 1, "inconclusive": 3, "invalid": 4, "no_benefit": 5, "stale": 6,
}  # fmt: skip
USAGE_EXIT = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One claim or guardrail over one stratum: `estimate` of a test, its interval, what it says.

    Bounds `low` and `high` are one-sided at `alpha` each (together the 1 - 2 alpha interval), in
    the unit of `estimate`: candidate less baseline for differences, candidate over baseline for
    ratios (1.0 is equal), a share for rates.
    """

    name: str  # unique in its verdict: `guardrail 1 support-qa correct`
    kind: Literal["claim", "guardrail", "control"]
    source: str  # `suite:NAME` or `replay:NAME`
    metric: str
    stratum: str  # `all`, `affected`, `tier=interactive`, ...
    test: str  # paired_ni, rate_max, ratio_ni, tost, superiority, identical, ...
    method: str  # tango, cluster_t, block_t, clopper_pearson, e_process, ...
    unit: Literal["difference", "ratio", "share"]
    pairs: int
    clusters: int | None
    lost: int | None  # right in the baseline, wrong in the candidate
    gained: int | None
    baseline: float | None  # each arm's own value
    candidate: float | None
    estimate: float | None
    low: float | None
    high: float | None
    margin: float | None  # as `estimate` counts: -0.02, 1.10, 0.002
    alpha: float
    p: float | None  # of the null hypothesis that harm is at least the margin
    decision: Literal["pass", "fail", "inconclusive"]
    reason: str = ""  # of an inconclusive one: underpowered, too_few_clusters, methods_disagree
    mde: float | None = (
        None  # smallest effect that these data could have shown, with the plan's power
    )
    pairs_needed: int | None = None  # for the margin that was asked for
    errors: int = 0  # requests of either arm that failed, counted as losses above
    complete_estimate: float | None = None  # of the pairs that failed in no arm
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Control:
    """An arm that checks the gate itself."""

    name: Literal["aa", "sabotage", "trend", "activation", "fingerprint", "errors", "generator"]
    ok: bool
    detail: Mapping[str, Any] = field(default_factory=dict)
    said: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole. `reasons` explain the decision in words, the weightiest first."""

    hypothesis: str
    decision: Decision
    reason: str  # "", underpowered, insensitive, too_few_clusters, errors, aa_failed, ...
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    controls: tuple[Control, ...]
    baseline: Side
    candidate: Side
    spec: Side  # hypothesis, each suite, each replay: leaf -> digest
    made_at: float  # seconds since 1970
    expires_at: float | None
    kind_of_change: str
    design: Mapping[str, Any]
    stats: Mapping[str, Any]
    versions: Mapping[str, str]
    pairs_sha256: str = ""
    schema: int = SCHEMA

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.decision]

    def payload(self) -> dict[str, Any]:
        """As JSON, all of it."""
        return asdict(self)

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> Verdict:
        """From `payload`. Raises KeyError or TypeError for what is none."""
        given = dict(payload)
        given["findings"] = tuple(Finding(**one) for one in given["findings"])
        given["controls"] = tuple(Control(**one) for one in given["controls"])
        for name in ("baseline", "candidate", "spec"):
            given[name] = Side(**given[name])
        given["reasons"] = tuple(given["reasons"])
        return cls(**given)
