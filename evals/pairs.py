"""Observations -> pairs: what two arms made of the same request. Knows no metric.

Order plays no part: pairs come sorted, whatever the order of the observations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from telemetry import Observation

BASELINE, CANDIDATE, AA, SABOTAGE = "baseline", "candidate", "aa", "sabotage"
ARMS = (BASELINE, CANDIDATE, AA, SABOTAGE)
MISSING = "this arm has no row for the request"

_Key = tuple[str, str, int]


class DuplicateRows(ValueError):
    """An arm answered one request twice: which of the two counts, nobody can say."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The same request in the baseline and in the arm that is compared with it."""

    baseline: Observation
    candidate: Observation

    @property
    def id(self) -> str:
        return self.baseline.id

    @property
    def source(self) -> str:
        return self.baseline.source

    @property
    def cluster(self) -> str:
        return self.baseline.cluster

    @property
    def block(self) -> tuple[int, int]:
        """The block of each arm: pairs that have both in common make one pair of blocks."""
        return self.baseline.block, self.candidate.block

    @property
    def complete(self) -> bool:
        return self.baseline.ok and self.candidate.ok


def by_arm(observations: Iterable[Observation]) -> dict[str, list[Observation]]:
    arms: dict[str, list[Observation]] = {}
    for one in observations:
        arms.setdefault(one.arm, []).append(one)
    return arms


def pair(baseline: Sequence[Observation], arm: Sequence[Observation]) -> tuple[Pair, ...]:
    """Each request of either arm: one that an arm has no row for has failed there, so that
    nothing gets better by leaving it out. A block of which the other arm was asked nothing is left
    out: a run that ends early ends between two arms. Raises DuplicateRows.
    """
    left, right = _keyed(baseline), _keyed(arm)
    both = [(left[key], right[key]) for key in sorted(left.keys() & right.keys())]
    there = _partners((a.source, a.block, b.block) for a, b in both)
    back = _partners((a.source, b.block, a.block) for a, b in both)
    pairs = [Pair(a, b) for a, b in both]
    pairs += [
        Pair(one, _missing(one, CANDIDATE, block))
        for key, one in left.items()
        if key not in right and (block := there.get((one.source, one.block))) is not None
    ]
    pairs += [
        Pair(_missing(one, BASELINE, block), one)
        for key, one in right.items()
        if key not in left and (block := back.get((one.source, one.block))) is not None
    ]
    return tuple(sorted(pairs, key=lambda one: _key(one.baseline)))


def pair_control(
    baseline: Sequence[Observation], control: Sequence[Observation]
) -> tuple[Pair, ...]:
    """The requests of a control arm, which may run on a part of them only."""
    keys = {_key(one) for one in control}
    return pair([one for one in baseline if _key(one) in keys], control)


def by_source(pairs: Iterable[Pair]) -> Mapping[str, tuple[Pair, ...]]:
    sources: dict[str, list[Pair]] = {}
    for one in pairs:
        sources.setdefault(one.source, []).append(one)
    return {source: tuple(sources[source]) for source in sorted(sources)}


def _partners(seen: Iterable[tuple[str, int, int]]) -> dict[tuple[str, int], int]:
    """For each block of one arm, the block of the other that has most of the same requests."""
    counts: dict[tuple[str, int], Counter[int]] = {}
    for source, own, other in seen:
        counts.setdefault((source, own), Counter())[other] += 1
    return {key: min(count, key=lambda one: (-count[one], one)) for key, count in counts.items()}


def _missing(other: Observation, arm: str, block: int) -> Observation:
    return Observation(
        id=other.id,
        source=other.source,
        arm=arm,
        cluster=other.cluster,
        block=block,
        repeat=other.repeat,
        tier=other.tier,
        tenant=other.tenant,
        turn=other.turn,
        at_s=other.at_s,
        outcome="error",
        status=0,
        problem=MISSING,
        ttft_target_s=other.ttft_target_s,
        tpot_target_s=other.tpot_target_s,
        prompt_tokens=other.prompt_tokens,
        max_tokens=other.max_tokens,
    )


def _key(one: Observation) -> _Key:
    return one.source, one.id, one.repeat


def _keyed(observations: Sequence[Observation]) -> dict[_Key, Observation]:
    keyed = {_key(one): one for one in observations}
    if len(keyed) < len(observations):
        seen: set[_Key] = set()
        for one in observations:
            if _key(one) in seen:
                raise DuplicateRows(
                    f"{one.source}: {one.arm} has request {one.id!r}, repeat {one.repeat}, twice; "
                    "ids are unique within a source and a repeat"
                )
            seen.add(_key(one))
    return keyed
