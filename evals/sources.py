"""What a hypothesis names -> what a run asks: a suite's rows, recorded traffic, as blocks.

Knows where each comes from and how it is scored; knows no arm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from evals.dataset import Suite, load_suite
from evals.design import Block, blocks_of_rows, blocks_of_time
from evals.filler import Filler
from evals.item import Item
from evals.metrics import NAMES, UnknownMetric, metric
from evals.rows import TraceError
from evals.run import Score, Source
from evals.scorers import CORRECT, needs_pairs, score, score_pairs, score_recorded
from evals.traces import read_trace
from policies.evidence import NoEvidence, find_source
from policies.hypothesis import Hypothesis
from policies.load import read_yaml
from policies.problems import PolicyError, Problem, closest, dotted
from telemetry import Observation

_OWN_CLUSTERS = ("conversation", "document")  # what a source calls its own clusters
_ANY_MODEL = "-"  # each arm is asked by the name of its own


def read_sources(
    file: str | Path, hypothesis: Hypothesis, *, allow_code: bool = False
) -> tuple[Source, ...]:
    """Every suite and replay that is named. Raises PolicyError: for what is not there at the place
    that names it, for what is wrong with it at its own, for a metric that nothing there counts.
    """
    claimed = (hypothesis.source_of(one) for one in hypothesis.claims)
    names = dict.fromkeys((*hypothesis.sources, *claimed))
    sources = tuple(_source(file, hypothesis, name, allow_code) for name in names)
    _refuse_unmeasured(file, hypothesis, sources)
    return sources


def _source(file: str | Path, hypothesis: Hypothesis, name: str, allow_code: bool) -> Source:
    design, stats = hypothesis.design, hypothesis.stats
    try:
        found = find_source(name, file)
        if name.startswith("suite:"):
            suite = load_suite(found, allow_code=allow_code)
            blocks = blocks_of_rows(name, suite.items, design, stats)
            blocks = _clustered(file, hypothesis, name, blocks)
            return Source(name, blocks, scored_by(suite), suite=suite)
        items = tuple(read_trace(found).items(Filler(), _ANY_MODEL))
        blocks = blocks_of_time(name, items, design, stats)
        blocks = _clustered(file, hypothesis, name, blocks)
        return Source(name, blocks, score_recorded, recorded=True)
    except NoEvidence as error:
        raise _named(file, hypothesis, name, str(error), error.suggestion) from None
    except TraceError as error:
        raise _named(file, hypothesis, name, str(error), None) from None


def _clustered(
    file: str | Path, hypothesis: Hypothesis, name: str, blocks: tuple[Block, ...]
) -> tuple[Block, ...]:
    """With the field that a guardrail names as what answers depend on together, in place of the
    source's own. Raises PolicyError where rows lack it, or it takes a conversation apart.
    """
    named = {
        index: one.cluster
        for index, one in enumerate(hypothesis.guardrails)
        if one.source == name and one.cluster not in (None, *_OWN_CLUSTERS)
    }
    if not named:
        return blocks
    (index, field), *others = named.items()
    items = [item for block in blocks for item in block.items]
    problem = next(
        (
            _place(file, at, f"{field!r} is named above, and a source has one")
            for at, other in others
            if other != field
        ),
        None,
    )
    if problem is None and (lacking := next((one for one in items if field not in one.meta), None)):
        near = closest(str(field), sorted(lacking.meta))
        problem = _place(file, index, f"row {lacking.id!r} of {name} has no field {field!r}", near)
    whole: dict[str, str] = {}
    for item in items if problem is None else ():
        if whole.setdefault(item.cluster, str(item.meta[field])) != str(item.meta[field]):
            why = f"takes the conversation {item.cluster!r} apart: its rows differ in {field!r}"
            problem = _place(file, index, why)
            break
    if problem is not None:
        raise PolicyError(problem)
    return tuple(
        replace(
            block,
            sessions=tuple(
                tuple(replace(item, cluster=str(item.meta[field])) for item in session)
                for session in block.sessions
            ),
        )
        for block in blocks
    )


def _place(file: str | Path, index: int, why: str, near: str | None = None) -> Problem:
    _, places, _ = read_yaml(str(file))
    path = ("guardrails", index, "cluster")
    return Problem(str(file), why, places.of(path), dotted(path), near)


def _refuse_unmeasured(
    file: str | Path, hypothesis: Hypothesis, sources: tuple[Source, ...]
) -> None:
    """A scorer that a suite does not have would be told after everything was asked."""
    counted = {one.name: _scores_of(one) for one in sources}
    _, places, _ = read_yaml(str(file))
    wrong = []
    asked = [
        *(
            ("guardrails", at, one.metric, one.source)
            for at, one in enumerate(hypothesis.guardrails)
        ),
        *(
            ("claims", at, one.metric, hypothesis.source_of(one))
            for at, one in enumerate(hypothesis.claims)
        ),
    ]
    for part, index, said, source in asked:
        assert source is not None, "the schema sees to it"
        name = _scorer_of(said)
        if name and name not in counted[source]:
            path = (part, index, "metric")
            there = ", ".join(sorted(counted[source]))
            why = f"nothing in {source} scores {name!r}; there are {there}, and times and tokens"
            near = closest(name, [*counted[source], *NAMES])
            wrong.append(Problem(str(file), why, places.of(path), dotted(path), near))
    if wrong:
        raise PolicyError(*wrong)


def _scorer_of(name: str) -> str:
    """The scorer that a metric reads, "" for none."""
    try:
        found = metric(name)
    except UnknownMetric:
        return ""  # told elsewhere, at its place
    return CORRECT if found.kind == "flip" else found.scorer


def _scores_of(source: Source) -> set[str]:
    if source.suite is None:
        expects = any(item.expected for block in source.blocks for item in block.items)
        return {"bad_output", "refusal", *(("f1",) if expects else ())}
    kinds = {one.kind for one in source.suite.scorers}
    judged = {"judge_errors"} if "judge" in kinds else set()
    return {CORRECT, *judged, *(one.called for one in source.suite.scorers)}


def scored_by(suite: Suite) -> Score:
    """Its scorers, as a run calls them."""

    async def scores(item: Item, seen: Observation) -> Mapping[str, float]:
        return await score(suite, item, seen)

    return scores


def _named(
    file: str | Path, hypothesis: Hypothesis, name: str, why: str, suggestion: str | None
) -> PolicyError:
    """A complaint at the first place that names a suite or replay."""
    _, places, _ = read_yaml(str(file))
    kind = name.partition(":")[0]
    for part in ("guardrails", "claims"):
        for index, one in enumerate(getattr(hypothesis, part)):
            if one.source == name:
                path = (part, index, kind)
                problem = Problem(str(file), why, places.of(path), dotted(path), suggestion)
                return PolicyError(problem)
    raise AssertionError(f"nothing names {name}")


async def compared(
    sources: Iterable[Source], observations: tuple[Observation, ...]
) -> tuple[Observation, ...]:
    """With the scores that need the answers of both arms."""
    suites = {one.name: one.suite for one in sources if one.suite is not None}
    if not any(needs_pairs(suite.scorers) for suite in suites.values()):
        return observations
    return await score_pairs(suites, observations)
