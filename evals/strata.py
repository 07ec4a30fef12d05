"""Parts of the traffic: by tier, tenant, turn, length of the prompt, and what a change touched.

The last is the guard against dilution: a change that touches 8 % of the requests can take 25 points
from these and leave 2 points overall. Knows no statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evals.pairs import Pair
from policies.hypothesis import Hypothesis
from telemetry import FROM_CACHE, Observation

ALL, AFFECTED = "all", "affected"
_BUCKETS = (256, 1024, 4096, 16384)  # tokens
# What an observation tells of a change: its request was touched where the arms differ in that.
TRACES: Mapping[str, Callable[[Observation], int | None]] = {
    "accepted_tokens": lambda seen: seen.accepted_tokens,
    "cached_answers": lambda seen: int(seen.replica == FROM_CACHE),
    "cached_tokens": lambda seen: seen.cached_tokens,
    "trimmed_tokens": lambda seen: seen.trimmed_tokens,
}
# A trim that shortens message by message tells no cut: the prompt is another one.
_SHORTENING = ("tool_output_chars", "passages")
_SHORTENED = "prompt_tokens"
_BY_KNOB: Mapping[str, str] = {
    "gateway.response_cache": "cached_answers",
    "gateway.trim": "trimmed_tokens",
    "runtime.speculation": "accepted_tokens",
}
# By whom it is told how many requests a change touches: by whoever plans, who wants just that
# planned; by an earlier run; by the rows, which say how many it may be at most; or by nobody.
Told = Literal["asked", "run", "rows", "nobody"]


@dataclass(frozen=True, slots=True)
class Reach:
    """Of a source's `rows`, so many are touched by the change; None where nobody knows. `how` in
    words.
    """

    source: str
    rows: int
    touched: int | None
    told: Told
    how: str

    @property
    def share(self) -> float:
        """All of them where nobody knows."""
        return 1.0 if self.touched is None else self.touched / max(self.rows, 1)

    def __str__(self) -> str:
        if self.touched is None:
            return f"{self.source}: not known before a run ({self.how})"
        most = "at most " if self.told == "rows" and self.touched else ""
        many = f"{self.touched:,}" if self.touched else "none"
        return f"{self.source}: {most}{many} of {self.rows:,} requests ({self.how})"


def _prompt_bucket(seen: Observation) -> str:
    tokens = seen.prompt_tokens
    if tokens is None:
        return "unknown"
    below = next((one for one in _BUCKETS if tokens < one), None)
    return f"<{below}" if below is not None else f">={_BUCKETS[-1]}"


# What a pair belongs to is told by its baseline, which the change did not touch.
_STRATA: Mapping[str, Callable[[Observation], str]] = {
    "tier": lambda seen: seen.tier or "none",
    "tenant": lambda seen: seen.tenant or "none",
    "turn": lambda seen: "first" if seen.turn == 0 else "later",
    "prompt_bucket": _prompt_bucket,
}


def strata(pairs: Sequence[Pair], by: Sequence[str]) -> dict[str, list[Pair]]:
    """`tier=interactive` -> its pairs, for each of `by`; one that all pairs share is left out."""
    parts: dict[str, list[Pair]] = {}
    for name in by:
        for one in pairs:
            parts.setdefault(f"{name}={_STRATA[name](one.baseline)}", []).append(one)
    return {name: parts[name] for name in sorted(parts) if len(parts[name]) < len(pairs)}


def traces(hypothesis: Hypothesis) -> tuple[str, ...]:
    """What tells whether a request was touched: names of `TRACES`, and of prompts that are
    shortened their length; none: all are.
    """
    patch = hypothesis.candidate.patch
    found = {
        name
        for knob, name in _BY_KNOB.items()
        for path in patch
        if path == knob or path.startswith(f"{knob}.")
    }
    if any(_shortens(path, value) for path, value in patch.items()):
        found.add(_SHORTENED)
    found |= {one.metric for one in hypothesis.activation if one.metric in TRACES}
    return tuple(sorted(found))


def affected(pairs: Sequence[Pair], fields: Sequence[str]) -> list[Pair]:
    """Those in which the arms differ in one of these traces, or of which that is not known: a
    request that failed in the candidate may have been touched.
    """
    return [one for one in pairs if not one.candidate.ok or _differs(one, fields)]


def touched(pairs: Sequence[Pair], fields: Sequence[str]) -> int:
    """How many requests the change is known to have touched."""
    return sum(_differs(one, fields) for one in pairs if one.candidate.ok)


def _shortens(path: str, value: object) -> bool:
    """Whether a patch says what is done to each message."""
    inside = path.removeprefix("gateway.trim")
    named = value if isinstance(value, dict) and not inside else inside.split(".")
    return path != inside and any(one in named for one in _SHORTENING)


def _differs(one: Pair, fields: Sequence[str]) -> bool:
    left, right = one.baseline, one.candidate
    before, after = left.prompt_tokens, right.prompt_tokens
    if _SHORTENED in fields and None not in (before, after) and before != after:
        return True
    return any(
        (TRACES[name](right) or 0) != (TRACES[name](left) or 0)
        for name in fields
        if name != _SHORTENED
    )
