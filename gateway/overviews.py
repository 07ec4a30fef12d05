"""The overviews of several gateway processes behind one port as one of all of them.

What is counted is added up, what was learned is averaged, and of states the worst is told. The
first of them is that of the process which was asked: what all have from one file or store is told
by it. Knows the shape of an overview, and nobody who makes one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gateway.arms import median_and_tail
from gateway.pause import Pause

One = Mapping[str, Any]

SUMMED = (
    "in_flight", "cached_tokens", "trim", "response_cache", "record", "tokens", "kept_traces",
)  # fmt: skip
WORST = ("ready", "draining", "starting", "half_open", "open", "down")  # the last is the worst
OVERLAP_S = 3.0  # of histories, so that each process has a sample at or before a moment


def together(found: Sequence[One], most: int) -> dict[str, Any]:
    """Of so many requests at most; without samples."""
    own = found[0]
    requests = [row for one in found for row in one["requests"]]
    if len(found) > 1:  # one alone has them in the order in which they ended
        requests.sort(key=lambda row: row["at"] + (row["e2e_s"] or 0.0), reverse=True)
    return {
        **own,
        **{name: total([one[name] for one in found]) for name in SUMMED},
        "process": _process([one["process"] for one in found]),
        "draining": any(one["draining"] for one in found),
        "policy": {**own["policy"], "refused": _first(one["policy"]["refused"] for one in found)},
        "models": sorted({name for one in found for name in one["models"]}),
        "tiers": _by(found, "tiers", "name", _tier),
        "replicas": _by(found, "replicas", "url", _replica),
        "rollout_lost": _first(one["rollout_lost"] for one in found),
        "requests": requests[:most],
    }


def total(values: Iterable[Any]) -> Any:
    """Numbers added up, by name where they have names; None where nobody has one."""
    some = [value for value in values if value is not None]
    if not some:
        return None
    if isinstance(some[0], Mapping):
        names = dict.fromkeys(name for one in some for name in one)
        return {name: total(one.get(name) for one in some) for name in names}
    return sum(some)


async def history(kept: Sequence[Sequence[One]], since: float) -> list[dict[str, Any]]:
    """A sample at each full second after `since` that all have reached; each process counts with
    its latest one then, and one that had not begun with nothing."""
    found = [samples for samples in kept if samples]
    if not found:
        return []
    moments = [[one["at"] for one in samples] for samples in found]
    begun = max(since, min(one[0] for one in moments))
    pause = Pause()
    told: list[dict[str, Any]] = []
    for at in range(math.floor(begun) + 1, math.floor(min(one[-1] for one in moments)) + 1):
        then = [
            samples[place - 1]
            for samples, one in zip(found, moments, strict=True)
            if (place := bisect_right(one, at))
        ]
        shares = [one["share"] for one in then]
        sums = total({k: v for k, v in one.items() if k not in ("at", "share")} for one in then)
        told.append({**sums, "at": at, "share": _first(shares)})
        await pause()
    return told


def _process(found: Sequence[One]) -> dict[str, Any]:
    """Another `id`: another set of processes, whose totals are others."""
    return {
        **found[0],
        "id": "+".join(sorted(one["id"] for one in found)),
        "started_at": min(one["started_at"] for one in found),
        "told": len(found),
    }


def _by(found: Sequence[One], what: str, key: str, put: Any) -> list[dict[str, Any]]:
    """Parts of the same name as one; in the order of the first process, others' own behind."""
    named: dict[str, list[One]] = {}
    for one in found:
        for part in one[what]:
            named.setdefault(part[key], []).append(part)
    return [put(parts) for parts in named.values()]


def _tier(found: Sequence[One]) -> dict[str, Any]:
    slowest = max((tuple(one["slowest"]) for one in found if one["slowest"]), default=None)
    return {
        **found[0],
        "now": total(one["now"] for one in found),
        "ttft_s": median_and_tail([s for one in found for s in one["ttft_s"]]),
        "tpot_s": median_and_tail([s for one in found for s in one["tpot_s"]]),
        "slowest": slowest[1] if slowest else None,
    }


def _replica(found: Sequence[One]) -> dict[str, Any]:
    own = found[0]
    in_flight = sum(one["in_flight"] for one in found)
    rates = [one["rates"] for one in found if one["rates"]]
    return {
        **own,
        "state": max((one["state"] for one in found), key=WORST.index),
        "error": _first(one["error"] for one in found),
        "in_flight": in_flight,
        # What others have on it by the store counts those that are told of here, too.
        "elsewhere": max(0, own["in_flight"] + own["elsewhere"] - in_flight),
        "waiting_tokens": sum(one["waiting_tokens"] for one in found),
        "ttft_s": _mean(one["ttft_s"] for one in found),
        "tried": total(one["tried"] for one in found),
        "rates": {
            "prefill_tokens_per_s": _mean(one["prefill_tokens_per_s"] for one in rates),
            "s_per_answer": _mean(one["s_per_answer"] for one in rates),
            "error_factor": max(one["error_factor"] for one in rates),
            "trusted": all(one["trusted"] for one in rates),
            "busy": min(1.0, sum(one["busy"] for one in rates)),
        }
        if rates
        else None,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    some = [value for value in values if value is not None]
    return sum(some) / len(some) if some else None


def _first(values: Iterable[Any]) -> Any:
    """The first that is there."""
    return next((value for value in values if value is not None), None)
