"""Proof that what changed did run: which counters can give it, known before anything is asked.

A counter's name in a hypothesis may leave out what our services put before and behind it. Knows
names; `controls.py` judges how far they rose.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from evals.questions import Unanswerable
from evals.strata import TRACES
from policies.hypothesis import Hypothesis
from policies.load import read_yaml
from policies.patching import Configured
from policies.problems import PolicyError, Problem, closest, dotted
from telemetry.counters import GATEWAY, WORKER

PREFIXES = ("", "headgate_", "headgate_gateway_")
# Of histograms, and of Python's own process: on our pages, and in no list of ours.
_UNLISTED = re.compile(r"^(?:process|python)_|_(?:count|sum|bucket)$")


def names_of(metric: str) -> tuple[str, ...]:
    """What an activation's metric may be called at /metrics, the likeliest first."""
    return tuple(f"{prefix}{metric}{ending}" for prefix in PREFIXES for ending in ("", "_total"))


def refuse_uncounted(
    file: str | Path, hypothesis: Hypothesis, candidate: Configured | None
) -> None:
    """Raises PolicyError for a counter that no service of a policy has, at its place. What a
    server at a URL counts (`candidate` is None) is known once it is there.
    """
    if candidate is None:
        return
    _, places, _ = read_yaml(str(file))
    served = (*GATEWAY, *(WORKER if candidate.deployment.runtime is not None else ()))
    wrong = []
    for index, one in enumerate(hypothesis.activation):
        if _is_there(one.metric, served) or _UNLISTED.search(one.metric):
            continue
        path = ("activation", index, "metric")
        if _is_there(one.metric, WORKER):
            why, near = f"{one.metric} is counted by workers, and the policy starts none", None
        else:
            why = f"no service counts {one.metric!r}: docs/metrics.md has what they count"
            near = _near(one.metric, served)
        wrong.append(Problem(str(file), why, places.of(path), dotted(path), near))
    if wrong:
        raise PolicyError(*wrong)


def refuse_missing(hypothesis: Hypothesis, told: Collection[str], pages: Iterable[str]) -> None:
    """Raises Unanswerable for a counter that is not on the candidate's pages, which tell `told`."""
    for index, one in enumerate(hypothesis.activation):
        if not _is_there(one.metric, told):
            near = _near(one.metric, told)
            hint = f"; did you mean {near!r}?" if near else ""
            why = f"nothing counts {one.metric!r} at the candidate's {', '.join(pages)}{hint}"
            raise Unanswerable(("activation", index, "metric"), why)


def _is_there(metric: str, counters: Collection[str]) -> bool:
    """Whether observations tell it, or one of the counters is meant."""
    names = names_of(metric.removesuffix("_total"))
    return metric in TRACES or any(name in counters for name in names)


def _near(metric: str, counters: Iterable[str]) -> str | None:
    return closest(_bare(metric), [*TRACES, *map(_bare, counters)])


def _bare(counter: str) -> str:
    """As people write it."""
    bare = counter.removesuffix("_total")
    for prefix in reversed(PREFIXES[1:]):
        bare = bare.removeprefix(prefix)
    return bare
