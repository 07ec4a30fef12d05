"""Latencies of both arms: how they are spread, and how their ratio went from block to block."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from evals.pairs import AA, Pair
from evals.questions import named
from evals.report.answers import paired
from evals.report.markup import Markup, join, tag
from evals.report.plot import Axis, Plot, Point, figure, legend, spread
from evals.report.words import NBSP
from evals.verdict import Finding
from telemetry import Observation

# A finding's metric -> field of an observation, and its name.
_TIMES = {
    "ttft": ("ttft_s", "time to first token"),
    "tpot": ("tpot_s", "time per output token"),
    "gap_max": ("gap_max_s", "longest gap"),
    "e2e": ("e2e_s", "whole answer"),
}
_ARMS = (("aa", "A/A′: the baseline again"), ("baseline", "baseline"), ("candidate", "candidate"))
_POINTS = 240


def latencies(findings: Sequence[Finding], rows: Sequence[Observation]) -> Markup:
    """Two pictures for each latency that was judged."""
    asked: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        name = finding.metric.partition(".")[0]
        if name in _TIMES and finding.stratum in ("", "all"):
            asked[finding.source, name].append(finding)
    return join(*(_one(rows, source, name, found) for (source, name), found in asked.items()))


def _one(
    rows: Sequence[Observation], source: str, name: str, findings: Sequence[Finding]
) -> Markup:
    field, words = _TIMES[name]
    arms: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.source == source:
            value = getattr(row, field)
            arms[row.arm].append(value if row.ok and value is not None else math.inf)
    shown = [(arm, said) for arm, said in _ARMS if any(0 < one < math.inf for one in arms[arm])]
    if not {"baseline", "candidate"} <= {arm for arm, _ in shown}:
        return Markup()
    where = named(source)
    return tag(
        "div",
        _spread({arm: arms[arm] for arm, _ in shown}, findings, f"{where}: {words}", shown),
        _strip(rows, source, field, findings),
        class_="two",
    )


def _quantiles(findings: Sequence[Finding]) -> list[float]:
    """0.95 of `ttft.p95`, each once."""
    names = {finding.metric.partition(".p")[2] for finding in findings}
    return sorted(float(name) / 100 for name in names if name.replace(".", "", 1).isdigit())


def _spread(
    arms: Mapping[str, Sequence[float]],
    findings: Sequence[Finding],
    heading: str,
    shown: Sequence[tuple[str, str]],
) -> Markup:
    """How many requests took at most so long. Those that failed never arrive: a curve ends low."""
    finite = sorted(one for values in arms.values() for one in values if 0 < one < math.inf)
    # The slowest in a thousand would squeeze all others together.
    low, high = spread([finite[len(finite) // 1000], finite[-1 - len(finite) // 1000]], log=True)
    slow = high >= 2
    axis = Axis(low, high, log=True, unit=f"{NBSP}s" if slow else "", scale=1 if slow else 1000)
    plot = Plot(axis, Axis(0, 1, unit=f"{NBSP}%", scale=100))
    marks = [
        plot.rule("target", y=quantile, name=f"p{100 * quantile:g}", start=True)
        for quantile in _quantiles(findings)
    ]
    marks += [plot.curve(_steps(values, low), arm) for arm, values in arms.items()]
    failed = {arm: sum(map(math.isinf, values)) for arm, values in arms.items()}
    lost = ", ".join(f"{count:,} in the {arm} arm" for arm, count in failed.items() if count)
    return figure(
        heading,
        plot.drawn(
            *marks, label=f"{heading}, distribution in each arm",
            x_name="seconds" if slow else "milliseconds", y_name="requests that took at most this",
        ),
        legend(*((arm, said) for arm, said in reversed(shown))),
        f"Requests that failed never arrive: {lost}." if lost else None,
    )  # fmt: skip


def _steps(values: Sequence[float], low: float) -> list[Point]:
    """The empirical distribution by at most a few hundred points, every one of the ends."""
    ordered = sorted(one for one in values if math.isfinite(one))
    stride = max(1, len(ordered) // _POINTS)
    kept = sorted(
        {*range(0, len(ordered), stride), *range(max(0, len(ordered) - 20), len(ordered))}
    )
    return [(low, 0.0), *((ordered[at], (at + 1) / len(values)) for at in kept)]


def _strip(
    rows: Sequence[Observation], source: str, field: str, findings: Sequence[Finding]
) -> Markup | None:
    """Candidate over baseline in each block, in the order of time, over the band of A/A."""
    quantile = (_quantiles(findings) or [0.5])[0]
    ratios = block_ratios(paired(rows, source), field, quantile)
    same = block_ratios(paired(rows, source, AA), field, quantile)
    if len(ratios) < 2:
        return None
    limits = [one.margin for one in findings if one.margin and one.kind == "guardrail"][:1]
    band = _band(list(same.values()))
    y = Axis(*spread([*ratios.values(), *same.values(), *band, *limits, 1.0], log=True), log=True)
    plot = Plot(Axis(-0.5, len(ratios) - 0.5, whole=True), y)
    marks = []
    if band:
        lower, upper = ([(-0.5, one), (len(ratios) - 0.5, one)] for one in band)
        marks.append(plot.band(lower, upper, "aa"))
    marks.append(plot.rule("zero", y=1.0))
    marks += [plot.rule("limit", y=value, name="limit") for value in limits]
    marks += [
        plot.dot(at, ratio, "candidate", f"block {block}: {ratio:.3f}")
        for at, (block, ratio) in enumerate(ratios.items())
    ]
    middle = math.exp(fmean(map(math.log, ratios.values())))
    marks.append(plot.rule("candidate", y=middle))
    heading = f"Ratio by block, p{100 * quantile:g}"
    return figure(
        heading,
        plot.drawn(*marks, label=f"{heading}: mean {middle:.3f} over {len(ratios)} blocks",
                   x_name="blocks in the order of time", y_name="candidate over baseline"),
        legend(("dot candidate", f"a block; the line is their mean, {middle:.3f}"),
               *([("area aa", "two deviations of the baseline against itself")] if band else [])),
    )  # fmt: skip


def _band(ratios: Sequence[float]) -> list[float]:
    """Two standard deviations about the mean, of logarithms. Nothing with fewer than three."""
    if len(ratios) < 3:
        return []
    logs = [math.log(one) for one in ratios]
    middle, wide = fmean(logs), 2 * stdev(logs)
    return [math.exp(middle - wide), math.exp(middle + wide)]


def block_ratios(pairs: Sequence[Pair], field: str, quantile: float) -> dict[int, float]:
    """Block of the baseline -> ratio of both arms' quantiles over the same requests."""
    blocks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        before, after = getattr(pair.baseline, field), getattr(pair.candidate, field)
        if pair.baseline.ok and pair.candidate.ok and before and after:
            blocks[pair.baseline.block].append((before, after))
    return {
        block: _quantile([after for _, after in both], quantile)
        / _quantile([before for before, _ in both], quantile)
        for block, both in sorted(blocks.items())
    }


def _quantile(values: Sequence[float], quantile: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]
