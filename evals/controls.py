"""What makes a comparison worth nothing, whatever its numbers say: checks of the run itself.

The A/A arm and the sabotaged one are judged with the tests of `battery.py`; here are the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evals.activation import names_of
from evals.pairs import AA, BASELINE, CANDIDATE, SABOTAGE, Pair
from evals.strata import TRACES
from evals.verdict import Control, Side
from policies.hypothesis import Activation
from telemetry import Observation

# More failures than this in what stands still, and what the candidate adds cannot be told.
BASELINE_FAILED_MAX = 0.05
# More than this of one source, and the candidate was not there rather than worse.
CANDIDATE_FAILED_MAX = 0.5
# More of what a judge was asked that it did not answer, and ties are no tie.
UNJUDGED_MAX = 0.05
_SAME = {BASELINE: "baseline", AA: "baseline", CANDIDATE: "candidate"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run knows beside its observations.

    `activation`: counter at /metrics -> by how much it rose in the candidate's arm.
    `fingerprints`: arm -> each `system_fingerprint` that its answers may carry; an arm that is not
    named may carry any, but only one. `generator`: why the load was not the one that was asked
    for, "" where it was. `design` and `versions` go into the verdict as they are.
    """

    activation: Mapping[str, float] = field(default_factory=dict)
    fingerprints: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    generator: str = ""
    design: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> Facts:
        """From JSON. Raises TypeError for fields that there are none of."""
        given = dict(payload)
        told = given.get("fingerprints", {})
        given["fingerprints"] = {arm: tuple(names) for arm, names in told.items()}
        return cls(**given)


def check_errors(pairs: Sequence[Pair], asked: Sequence[str]) -> Control:
    """Failures are outcomes and count as losses; but where the baseline fails too, or the
    candidate answers next to nothing, nothing is compared. `asked`: sources that there should be.
    """
    sources: dict[str, dict[str, Any]] = {}
    said = []
    for source in dict.fromkeys((*asked, *sorted({one.source for one in pairs}))):
        rows = [one for one in pairs if one.source == source]
        if not rows:
            said.append(f"{source}: no request was asked of either arm")
            continue
        base = _broken([one.baseline for one in rows]) / len(rows)
        arm = sum(not one.candidate.ok for one in rows) / len(rows)
        answered = sum(one.baseline.ok for one in rows)
        sources[source] = {"pairs": len(rows), "baseline": base, "candidate": arm}
        if base > BASELINE_FAILED_MAX or not answered:
            share = max(base, 1 - answered / len(rows))
            why = _mostly([one.baseline for one in rows])
            said.append(f"{source}: the baseline itself failed {share:.1%} of its requests ({why})")
        elif arm > CANDIDATE_FAILED_MAX:
            why = _mostly([one.candidate for one in rows])
            said.append(f"{source}: the candidate failed {arm:.1%} of its requests ({why})")
        if (unjudged := _unjudged(rows)) > UNJUDGED_MAX:
            said.append(f"{source}: the judge did not answer for {unjudged:.1%} of the answers")
    return Control("errors", not said, {"sources": sources}, "; ".join(said))


def _unjudged(pairs: Sequence[Pair]) -> float:
    """Of the answers that a judge was asked about, the share that it could not be brought to judge;
    they count as ties, and a judge that is down would make everything one.
    """
    both = [one.scores for pair in pairs for one in (pair.baseline, pair.candidate)]
    asked = [one["judge_errors"] for one in both if one.get("judge_asked")]
    return sum(asked) / len(asked) if asked else 0.0


def check_fingerprints(
    observations: Iterable[Observation], sides: tuple[Side, Side], facts: Facts
) -> Control:
    """Each answer came from the configuration that its arm is of."""
    told: dict[str, set[str]] = {}
    for one in observations:
        if one.fingerprint:
            told.setdefault(one.arm, set()).add(one.fingerprint)
    said = []
    for arm in sorted(told):
        allowed = facts.fingerprints.get(arm if arm != SABOTAGE else BASELINE)
        foreign = sorted(told[arm] - set(allowed)) if allowed else sorted(told[arm])[1:]
        if foreign:
            said.append(f"the {arm} arm answered as {', '.join(foreign[:3])}, which it is not")
    detail = {
        "answered": {arm: sorted(told[arm]) for arm in sorted(told)},
        "roots": {arm: sides[which == "candidate"].root for arm, which in _SAME.items()},
    }
    return Control("fingerprint", not said, detail, "; ".join(said))


def check_activation(
    wanted: Sequence[Activation], pairs: Sequence[Pair], exposed: int | None, facts: Facts
) -> Control:
    """What changed did run: counters rose, and some request was touched by it. `exposed` counts
    those that were; None where a change touches every one.
    """
    counters: dict[str, Any] = {}
    said = []
    for one in wanted:
        found = _counted(one.metric, pairs, facts)
        counters[one.metric] = {"found": found, "min": one.min}
        if found is None:
            said.append(f"nothing counts {one.metric}: the candidate's /metrics do not have it")
        elif found < one.min:
            said.append(f"{one.metric} rose by {found:g} where {one.min:g} prove that it ran")
    if exposed == 0:
        said.append("no request of the candidate was touched by the change")
    detail = {"counters": counters, "exposed": exposed}
    return Control("activation", not said, detail, "; ".join(said))


def check_generator(facts: Facts) -> Control:
    """The load was sent when it was due."""
    return Control("generator", not facts.generator, {}, facts.generator)


def _mostly(observations: Iterable[Observation]) -> str:
    """The first line of what went wrong most often."""
    why = Counter(one.problem.partition("\n")[0] for one in observations if not one.ok)
    return max(sorted(why), key=lambda name: why[name]) or "no reason given"


def _broken(observations: Iterable[Observation]) -> int:
    """Failures that are nobody's decision: one that was sent away for overload was answered."""
    return sum(not one.ok and one.outcome != "refused" for one in observations)


def _counted(name: str, pairs: Sequence[Pair], facts: Facts) -> float | None:
    known = facts.activation
    if (counter := next((each for each in names_of(name) if each in known), None)) is not None:
        return known[counter]
    trace = TRACES.get(name)
    if trace is None:
        return None
    told = [trace(one.candidate) for one in pairs]
    return float(sum(one or 0 for one in told)) if any(one is not None for one in told) else None
