"""A hypothesis -> the questions that its observations have to answer, one a claim or guardrail.

Knows which test fits which metric. Knows no observations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from evals.metrics import Kind, Metric, UnknownMetric, late, metric
from policies.hypothesis import Claim, Guardrail, Hypothesis
from policies.load import read_yaml
from policies.problems import PolicyError, Problem, dotted

SUPERIORITY = "superiority"
# Test -> the kinds of metrics that it can be asked of.
TESTS: Mapping[str, tuple[Kind, ...]] = {
    "paired_ni": ("share",),
    "rate_max": ("share", "flip"),
    "mean_max": ("drift", "tokens", "share"),
    "ratio_ni": ("time", "rate", "tokens"),
    "tost": ("tokens", "time", "rate"),
    "percentile_max": ("time",),
    "identical": ("divergence",),
    "law_max": ("law",),
    SUPERIORITY: ("share", "time", "rate", "tokens"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """`bound` as the file has it, positive: a margin, a maximum, the least that a claim gains."""

    name: str
    kind: Literal["claim", "guardrail"]
    source: str
    metric: Metric
    test: str
    bound: float
    strata: tuple[str, ...] = ()

    @property
    def unit(self) -> Literal["difference", "ratio", "share"]:
        if self.test in ("rate_max", "mean_max", "percentile_max", "law_max"):
            return "share"
        return "ratio" if self.metric.kind in ("time", "rate", "tokens") else "difference"

    @property
    def margin(self) -> float:
        """As estimates count: -0.02, 1.10, 0.002. Beyond it lies harm; of a claim, the gain."""
        if self.unit == "share":
            return self.bound
        rises = (self.metric.better == "higher") == (self.kind == "claim")
        sign = 1 if rises else -1
        return sign * self.bound if self.unit == "difference" else 1 + sign * self.bound


class Unanswerable(ValueError):
    """A hypothesis asks what no observation can answer; `where` is the path in its file."""

    def __init__(self, where: tuple[str | int, ...], why: str) -> None:
        super().__init__(f"{'.'.join(str(one) for one in where)}: {why}")
        self.where = where
        self.why = why


def questions(hypothesis: Hypothesis) -> tuple[Question, ...]:
    """Guardrails first, then claims. Raises Unanswerable."""
    return (*_guardrails(hypothesis), *_claims(hypothesis))


def asked_in(file: str | Path, hypothesis: Hypothesis) -> tuple[Question, ...]:
    """Of a hypothesis in a file. Raises PolicyError at the place of what cannot be answered."""
    try:
        return questions(hypothesis)
    except Unanswerable as error:
        raise PolicyError(placed(file, error)) from None


def placed(file: str | Path, error: Unanswerable) -> Problem:
    """What cannot be answered, at its place in the hypothesis' file."""
    _, places, _ = read_yaml(str(file))
    return Problem(str(file), error.why, places.of(error.where), dotted(error.where))


def _guardrails(hypothesis: Hypothesis) -> Iterator[Question]:
    for index, one in enumerate(hypothesis.guardrails):
        where = ("guardrails", index)
        found = _metric(one, where, one.test)
        bound = one.max if one.margin is None else one.margin
        if (quantile := found.quantile) is not None and one.within is not None:
            found, bound = late(found, one.within), 1 - quantile
        if bound is None or one.source is None:
            raise Unanswerable(where, f"{one.test} has no bound, or no suite or replay")
        yield Question(
            name=_name("guardrail", index, one.source, found, one.test),
            kind="guardrail",
            source=one.source,
            metric=found,
            test=one.test,
            bound=bound,
            strata=one.strata,
        )


def _claims(hypothesis: Hypothesis) -> Iterator[Question]:
    for index, one in enumerate(hypothesis.claims):
        where = ("claims", index)
        found = _metric(one, where, SUPERIORITY)
        if found.kind in ("time", "rate") and found.better != one.direction:
            why = f"of {one.metric} {found.better} is better, not {one.direction}"
            raise Unanswerable((*where, "direction"), why)
        source = hypothesis.source_of(one)
        yield Question(
            name=_name("claim", index, source, found, ""),
            kind="claim",
            source=source,
            metric=replace(found, better=one.direction),
            test=SUPERIORITY,
            bound=one.min_effect,
        )


def _metric(asked: Claim | Guardrail, where: tuple[str | int, ...], test: str) -> Metric:
    try:
        found = metric(asked.metric)
    except UnknownMetric as error:
        raise Unanswerable((*where, "metric"), str(error)) from None
    if found.kind not in TESTS[test]:
        fitting = [name for name, kinds in TESTS.items() if found.kind in kinds]
        may = " or ".join(name for name in fitting if name != SUPERIORITY)
        why = f"{asked.metric} cannot be shown by {test}" + (f"; use {may}" if may else "")
        raise Unanswerable((*where, "test" if test != SUPERIORITY else "metric"), why)
    if test == "percentile_max" and found.quantile is None:
        why = f"{asked.metric} is no percentile: name one, such as ttft.p99"
        raise Unanswerable((*where, "metric"), why)
    if test in ("rate_max", "mean_max") and found.better == "higher":
        why = f"{test} bounds what nobody wants, and more of {asked.metric} is better"
        raise Unanswerable((*where, "test"), why)
    return found


def named(source: str) -> str:
    """`qa` of `suite:qa`; of one that is named by its file, the file's name."""
    name = source.partition(":")[2] or source
    return Path(name).stem if "/" in name else name


def _name(kind: str, index: int, source: str, found: Metric, test: str) -> str:
    return " ".join(filter(None, (kind, str(index + 1), named(source), found.name, test)))
