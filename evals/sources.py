"""What a hypothesis names -> what a run asks: a suite's rows, recorded traffic, as blocks.

Knows where each comes from and how it is scored; knows no arm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from evals.dataset import Suite, load_suite
from evals.design import blocks_of_rows, blocks_of_time
from evals.filler import Filler
from evals.item import Item
from evals.rows import TraceError
from evals.run import Score, Source
from evals.scorers import needs_pairs, score, score_pairs, score_recorded
from evals.traces import read_trace
from policies.evidence import NoEvidence, find_source
from policies.hypothesis import Hypothesis
from policies.load import read_yaml
from policies.problems import PolicyError, Problem, dotted
from telemetry import Observation

_ANY_MODEL = "-"  # each arm is asked by the name of its own


def read_sources(
    file: str | Path, hypothesis: Hypothesis, *, allow_code: bool = False
) -> tuple[Source, ...]:
    """Every suite and replay that is named. Raises PolicyError: for what is not there at the place
    that names it, for what is wrong with it at its own.
    """
    return tuple(_source(file, hypothesis, name, allow_code) for name in hypothesis.sources)


def _source(file: str | Path, hypothesis: Hypothesis, name: str, allow_code: bool) -> Source:
    design, stats = hypothesis.design, hypothesis.stats
    try:
        found = find_source(name, file)
        if name.startswith("suite:"):
            suite = load_suite(found, allow_code=allow_code)
            blocks = blocks_of_rows(name, suite.items, design, stats)
            return Source(name, blocks, scored_by(suite), suite=suite)
        items = tuple(read_trace(found).items(Filler(), _ANY_MODEL))
        blocks = blocks_of_time(name, items, design, stats)
        return Source(name, blocks, score_recorded, recorded=True)
    except NoEvidence as error:
        raise _named(file, hypothesis, name, str(error), error.suggestion) from None
    except TraceError as error:
        raise _named(file, hypothesis, name, str(error), None) from None


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
