"""Each pair as one square, and the worst lost answers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evals.metrics import Metric
from evals.questions import named
from evals.report.answers import (
    Fate,
    Lost,
    Part,
    difference,
    fates,
    paired,
    scored,
    worst,
)  # fmt: skip
from evals.report.markup import Markup, join, tag
from evals.report.plot import figure, legend
from telemetry import Observation

_NAMES: dict[Fate, str] = {
    "lost": "lost: right before, wrong now",
    "gained": "gained: wrong before, right now",
    "wrong": "wrong in both",
    "right": "right in both",
}
_COLUMNS = (20, 60)
_SQUARES = 6_000  # more pairs than these share squares
_CELL, _GAP = 10, 2
_SHOWN = 12
_CHARACTERS = 6_000


def answers(rows: Sequence[Observation], source: str, by: Metric) -> Markup:
    """Waffle and worst losses of one suite by one score. Nothing where nothing was scored."""
    pairs = paired(rows, source)
    if not scored(pairs, by):
        return Markup()
    counts = fates(pairs, by)
    name = named(source)
    per_square = max(1, math.ceil(len(pairs) / _SQUARES))
    same = "A square is a pair." if per_square == 1 else f"A square is {per_square} pairs."
    lost = worst(pairs, by, _SHOWN)
    return join(
        figure(
            f"{name}: {by.name}",
            _waffle(counts, per_square, f"{name} {by.name}"),
            legend(*((f"fill {fate}", f"{counts[fate]:,} {_NAMES[fate]}") for fate in _NAMES)),
            f"{same} {_balance(counts)}",
        ),
        _losses(lost, counts["lost"], by.name),
    )


def _balance(counts: Mapping[Fate, int]) -> str:
    total = sum(counts.values())
    net = counts["gained"] - counts["lost"]
    flips = counts["gained"] + counts["lost"]
    return (
        f"{flips:,} of {total:,} answers flipped ({100 * flips / total:.1f} %); "
        f"the averages show only what did not cancel, {100 * net / total:+.1f} points."
    ).replace("-", "−")


def _waffle(counts: Mapping[Fate, int], per_square: int, name: str) -> Markup:
    squares = {fate: math.ceil(count / per_square) for fate, count in counts.items()}
    total = sum(squares.values())
    columns = min(max(math.ceil(math.sqrt(4 * total)), _COLUMNS[0]), _COLUMNS[1])
    rows = math.ceil(total / columns)
    at, lines = 0, []
    for fate, count in squares.items():
        lines += _run(fate, at, count, columns)
        at += count
    said = ", ".join(f"{count:,} {_NAMES[fate]}" for fate, count in counts.items())
    return tag(
        "svg", *lines, viewBox=f"0 0 {columns * _CELL - _GAP} {max(rows, 1) * _CELL - _GAP}",
        class_="waffle", style=f"max-width: {columns * 1.5 * _CELL:g}px",
        role="img", aria_label=f"{name}: {said}",
    )  # fmt: skip


def _run(fate: str, start: int, count: int, columns: int) -> list[Markup]:
    """Squares one after another over the ends of rows: a dashed line for each row."""
    lines = []
    while count > 0:
        row, column = divmod(start, columns)
        width = min(count, columns - column)
        y = row * _CELL + (_CELL - _GAP) / 2
        x = column * _CELL
        lines.append(
            tag("line", x1=x, x2=x + width * _CELL - _GAP, y1=y, y2=y, class_=f"squares {fate}")
        )
        start, count = start + width, count - width
    return lines


def _losses(lost: Sequence[Lost], count: int, metric: str) -> Markup | None:
    if not lost:
        return None
    heading = f"The worst {len(lost)}" if count > len(lost) else "All of them"
    return tag(
        "div",
        tag("h3", "Lost answers"),
        tag("p", f"{heading}, the largest loss first. What is struck out is gone, what is "
                 "underlined is new."),
        *(_loss(one, metric, first=at == 0) for at, one in enumerate(lost)),
        class_="losses",
    )  # fmt: skip


def _loss(lost: Lost, metric: str, *, first: bool) -> Markup:
    before, after = lost.pair.baseline, lost.pair.candidate
    left, right = difference(before.text[:_CHARACTERS], after.text[:_CHARACTERS])
    if not after.text:  # nothing came: that is not an edit of what was there
        left = [("same", text) for _, text in left]
    cluster = f" in {before.cluster}" if before.cluster not in ("", before.id) else ""
    return tag(
        "details",
        tag(
            "summary",
            tag("code", before.id),
            tag("span", f"{cluster} {metric} {lost.before:.2g} → {lost.after:.2g}", class_="quiet"),
        ),
        tag("div", _side("Baseline", before, left), _side("Candidate", after, right),
            class_="sides"),
        open=first,
    )  # fmt: skip


def _side(name: str, row: Observation, parts: Sequence[Part]) -> Markup:
    told = [f"{row.completion_tokens:,} tokens"] if row.completion_tokens is not None else []
    told += [one for one in (row.finish_reason, "" if row.ok else row.outcome) if one]
    told += [f"{key} {value:.2g}" for key, value in sorted(row.scores.items())]
    cut = len(row.text) - _CHARACTERS
    return tag(
        "div",
        tag("h4", name, tag("span", " · ".join(told), class_="quiet")),
        tag("pre", *(_part(*part) for part in parts)) if parts else None,
        None if row.ok else tag("p", row.problem or row.outcome, class_="problem"),
        None if parts or not row.ok else tag("p", "An empty answer.", class_="problem"),
        tag("p", f"{cut:,} characters more.", class_="quiet") if cut > 0 else None,
    )


def _part(kind: str, text: str) -> Markup:
    if kind == "same":
        return join(text)
    return tag("del" if kind == "gone" else "ins", text)
