"""The menu: what each technique brings and takes on one's own workload, a row for each.

A row is a gate's run of a hypothesis that is written for it, so its verdict is one that counts.
Knows what to ask and what to read of a run; neither how it is run nor how it is shown.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evals.pairs import BASELINE, CANDIDATE, by_arm
from evals.techniques import Technique
from evals.verdict import Finding, Verdict
from telemetry import Observation

_CLAIM = re.compile(r"claim \d+ (?P<what>.*?), which (?:shows|does not show) the (?P<asked>\S+ %)")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked, and how much may be lost: two points of answers, a tenth of time and length.

    `gain`: a technique that gains less than this share anywhere has no benefit.
    """

    suites: tuple[str, ...]
    replays: tuple[str, ...] = ()
    margin: float = 0.02
    slower: float = 0.10
    gain: float = 0.03
    concurrency: int = 4
    max_pairs: int = 1000
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Figures:
    """One arm: times in seconds, None where nothing told them."""

    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    tpot_p50_s: float | None = None
    tokens_per_s: float | None = None
    memory_bytes: int | None = None
    cost: float | None = None  # of a million tokens; without a price, of the baseline's


@dataclass(frozen=True, slots=True)
class Row:
    """A technique, beside the baseline that ran interleaved with it.

    `lost`, `gained`: answers of `pairs` that flipped. `quality`: difference of right answers with
    its interval and the margin; None where nothing was scored. `run`: folder with verdict and rows.
    """

    name: str
    said: str
    patch: Mapping[str, Any]
    kind: str
    complexity: int
    figures: Figures
    baseline: Figures
    pairs: int
    lost: int | None
    gained: int | None
    quality: tuple[float, float, float] | None
    margin: float | None
    decision: str  # of the verdict, or `refused`: then nothing was measured
    reason: str
    run: str

    def payload(self) -> dict[str, Any]:
        return asdict(self)


def hypothesis_of(technique: Technique, policy: str, workload: Workload) -> dict[str, Any]:
    """As its file says it: the policy against itself with the patch, over the workload. Files are
    named as seen from its folder."""
    guardrails: list[dict[str, Any]] = []
    for suite in workload.suites:
        guardrails += [
            {"suite": suite, "metric": "correct", "test": "paired_ni", "margin": workload.margin},
            {"suite": suite, "metric": "output_tokens", "test": "tost", "margin": workload.slower},
        ]
    for replay in workload.replays:
        guardrails += [
            {"replay": replay, "metric": "ttft.p95", "test": "ratio_ni", "margin": workload.slower},
            {"replay": replay, "metric": "output_tokens", "test": "tost",
             "margin": workload.slower},
        ]  # fmt: skip
    gains = (("ttft.p50", "lower"), ("tpot.p50", "lower"), ("throughput", "higher"),
             ("cost", "lower"))  # fmt: skip
    return {
        "apiVersion": "headgate/v1",
        "kind": "Hypothesis",
        "metadata": {"name": technique.file_name, "note": technique.said},
        "baseline": {"config": policy},
        "candidate": {"patch": dict(technique.patch)},
        "kind_of_change": technique.kind,
        "claims": [
            {"metric": metric, "direction": direction, "min_effect": workload.gain}
            for metric, direction in gains
        ],
        "guardrails": guardrails,
        "design": {"concurrency": workload.concurrency},
        "stats": {"max_pairs": workload.max_pairs, "seed": workload.seed},
    }


def row_of(
    technique: Technique,
    verdict: Verdict,
    observations: Sequence[Observation],
    run: str,
    memory: Mapping[str, int],
    price: float | None = None,
) -> Row:
    """What a run says. `memory`: arm -> resident bytes. `price`: of an hour of the machine."""
    arms = by_arm(observations)
    before = figures(arms.get(BASELINE, ()), memory.get(BASELINE))
    after = figures(arms.get(CANDIDATE, ()), memory.get(CANDIDATE))
    quality = _quality(verdict.findings)
    return Row(
        name=technique.name,
        said=technique.said,
        patch=technique.patch,
        kind=technique.kind,
        complexity=technique.complexity,
        figures=_priced(after, before, price),
        baseline=_priced(before, before, price),
        pairs=quality.pairs if quality else len(arms.get(CANDIDATE, ())),
        lost=quality.lost if quality else None,
        gained=quality.gained if quality else None,
        quality=_interval(quality),
        margin=quality.margin if quality else None,
        decision=verdict.decision,
        reason=verdict.reason or _reason(verdict),
        run=run,
    )


def refused(technique: Technique, why: str) -> Row:
    """One that could not be measured at all."""
    nothing = Figures()
    return Row(
        technique.name, technique.said, technique.patch, technique.kind, technique.complexity,
        nothing, nothing, 0, None, None, None, None, "refused", why, "",
    )  # fmt: skip


def pooled(rows: Sequence[Row]) -> Figures:
    """The baseline's own row: the median of what it was beside each technique."""

    def middle(read: Callable[[Figures], float | None]) -> float | None:
        known = sorted(value for row in rows if (value := read(row.baseline)) is not None)
        return known[len(known) // 2] if known else None

    memory = middle(lambda one: one.memory_bytes)
    return Figures(
        ttft_p50_s=middle(lambda one: one.ttft_p50_s),
        ttft_p95_s=middle(lambda one: one.ttft_p95_s),
        tpot_p50_s=middle(lambda one: one.tpot_p50_s),
        tokens_per_s=middle(lambda one: one.tokens_per_s),
        memory_bytes=None if memory is None else int(memory),
        cost=middle(lambda one: one.cost),
    )


def figures(observations: Sequence[Observation], memory: int | None = None) -> Figures:
    """Of one arm. A request that failed is slower than any; its tokens are not counted."""
    return Figures(
        ttft_p50_s=_quantile(observations, "ttft_s", 0.5),
        ttft_p95_s=_quantile(observations, "ttft_s", 0.95),
        tpot_p50_s=_quantile(observations, "tpot_s", 0.5),
        tokens_per_s=tokens_per_s(observations),
        memory_bytes=memory,
    )


def tokens_per_s(observations: Iterable[Observation]) -> float | None:
    """Tokens of answers over the time in which the arm was asked: from a block's first request to
    its last end, all blocks together."""
    blocks: dict[tuple[str, int], list[Observation]] = defaultdict(list)
    for one in observations:
        blocks[one.source, one.block].append(one)
    tokens = sum(one.completion_tokens or 0 for rows in blocks.values() for one in rows if one.ok)
    took_s = math.fsum(
        max(one.at_s + (one.e2e_s or 0.0) for one in rows) - min(one.at_s for one in rows)
        for rows in blocks.values()
    )
    return tokens / took_s if took_s > 0 and tokens else None


def _quantile(observations: Sequence[Observation], name: str, quantile: float) -> float | None:
    """None where no request told it, or where so many failed that there is none."""
    values = sorted(
        value if (value := getattr(one, name)) is not None else math.inf
        for one in observations
        if not one.ok or getattr(one, name) is not None
    )
    if not values:
        return None
    found = values[min(int(quantile * len(values)), len(values) - 1)]
    return found if math.isfinite(found) else None


def _priced(one: Figures, baseline: Figures, price: float | None) -> Figures:
    cost = None
    if one.tokens_per_s and price is not None:
        cost = price / 3600 / one.tokens_per_s * 1e6
    elif one.tokens_per_s and baseline.tokens_per_s:
        cost = baseline.tokens_per_s / one.tokens_per_s
    return Figures(
        one.ttft_p50_s, one.ttft_p95_s, one.tpot_p50_s, one.tokens_per_s, one.memory_bytes, cost
    )


def _quality(findings: Sequence[Finding]) -> Finding | None:
    """The finding on right answers that is worst for its margin."""
    scored = [
        one
        for one in findings
        if one.metric == "correct" and one.kind == "guardrail" and one.stratum == "all"
    ]
    return min(scored, key=lambda one: math.inf if one.low is None else one.low, default=None)


def _reason(verdict: Verdict) -> str:
    """What decided; where gains do, the one that is nearest to being shown, of those asked for."""
    claims = [one for one in verdict.findings if one.kind == "claim" and one.stratum == "all"]
    if verdict.decision in ("pass", "no_benefit") and claims:
        best = min(claims, key=lambda one: 1.0 if one.p is None else one.p)
        begin = f"claim {claims.index(best) + 1} "
        said = next((one for one in verdict.reasons if one.startswith(begin)), "")
        found = _CLAIM.match(said)
        if found is None:
            return said
        return (
            found["what"]
            if verdict.decision == "pass"
            else f"{found['what']}, {found['asked']} asked for"
        )
    return "; ".join(verdict.reasons[:1])


def _interval(finding: Finding | None) -> tuple[float, float, float] | None:
    if finding is None or finding.estimate is None or finding.low is None or finding.high is None:
        return None
    return finding.low, finding.estimate, finding.high
