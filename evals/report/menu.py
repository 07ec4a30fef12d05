"""The menu as people read it: a table for the terminal, and a page with the trade-off drawn.

Knows rows, not how they came to be.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.menu import Figures, Row, pooled
from evals.report.forest import badge
from evals.report.markup import Markup, join, tag
from evals.report.page import document, facts, themes
from evals.report.plot import Axis, Plot, figure, legend, spread
from evals.report.words import NBSP, SIGNS, TITLES, moment

HEADINGS = (
    "technique", "TTFT p50", "TTFT p95", "TPOT p50", "tokens/s", "memory", "cost", "lost/gained",
    "quality", "complexity", "verdict",
)  # fmt: skip
_DASH = "–"
_CHARACTER, _LINE = 0.0095, 0.06  # of a name in the drawing, as shares of its sides
_BESIDE = (
    "Changes are against the baseline that ran interleaved with each technique; its own row has "
    "the medians of those."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A value, and how it differs from the baseline's: better, worse, or neither."""

    text: str
    change: str = ""
    tone: str = ""


def terminal(rows: Sequence[Row], price: float | None) -> list[str]:
    """Lines, the baseline first, columns aligned."""
    table = [[Cell(name) for name in HEADINGS], _baseline(rows, price)]
    table += [cells(row, price) for row in rows]
    texts = [[f"{cell.text} {cell.change}".strip() for cell in line] for line in table]
    widths = [max(len(line[at]) for line in texts) for at in range(len(HEADINGS))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in texts
    ]
    notes = [f"{row.name}: {row.reason}" for row in rows if row.reason]
    beside = [_BESIDE] if any(row.run for row in rows) else []
    return [*lines, "", *beside, *notes]


def cells(row: Row, price: float | None = None) -> list[Cell]:
    """One technique, in the order of HEADINGS."""
    if row.decision == "refused":
        return [Cell(row.name), *[Cell(_DASH)] * (len(HEADINGS) - 2), Cell("refused")]
    now, was = row.figures, row.baseline
    flips = f"{row.lost}/{row.gained}" if row.lost is not None else _DASH
    return [
        Cell(row.name),
        _time(now.ttft_p50_s, was.ttft_p50_s),
        _time(now.ttft_p95_s, was.ttft_p95_s),
        _time(now.tpot_p50_s, was.tpot_p50_s),
        _changed(_number(now.tokens_per_s), now.tokens_per_s, was.tokens_per_s, more=True),
        _changed(_bytes(now.memory_bytes), now.memory_bytes, was.memory_bytes),
        Cell(_cost(now.cost, price)),
        Cell(f"{flips} of {row.pairs:,}" if flips != _DASH else _DASH),
        Cell(_quality(row)),
        Cell("●" * row.complexity + "○" * (5 - row.complexity)),
        Cell(TITLES[row.decision]),
    ]


def _baseline(rows: Sequence[Row], price: float | None) -> list[Cell]:
    one = pooled(rows)
    texts = [
        "baseline", _seconds(one.ttft_p50_s), _seconds(one.ttft_p95_s), _seconds(one.tpot_p50_s),
        _number(one.tokens_per_s), _bytes(one.memory_bytes), _cost(one.cost, price),
    ]  # fmt: skip
    return [Cell(text) for text in texts] + [Cell(_DASH)] * (len(HEADINGS) - len(texts))


def _time(now: float | None, was: float | None) -> Cell:
    return _changed(_seconds(now), now, was)


def _changed(text: str, now: float | None, was: float | None, *, more: bool = False) -> Cell:
    """With its change in per cent; one of less than half a per cent is none."""
    if not now or not was:
        return Cell(text)
    change = 100 * (now / was - 1)
    if abs(change) < 0.5:
        return Cell(text, f"±0{NBSP}%")
    tone = "better" if (change > 0) == more else "worse"
    return Cell(text, f"{change:+.0f}{NBSP}%".replace("-", "−"), tone)


def _seconds(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:.2f}{NBSP}s" if value >= 1 else f"{1000 * value:.3g}{NBSP}ms"


def _number(value: float | None) -> str:
    return _DASH if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value / 2**30:.2f}{NBSP}GiB" if value >= 2**30 else f"{value / 2**20:.0f}{NBSP}MiB"


def _cost(value: float | None, price: float | None) -> str:
    if value is None:
        return _DASH
    return f"×{value:.2f}" if price is None else f"{value:.3g}"


def _quality(row: Row) -> str:
    if row.quality is None:
        return _DASH
    low, middle, high = (f"{100 * one:+.1f}".replace("-", "−") for one in row.quality)
    return f"{middle} ({low} … {high}){NBSP}pp"


# ---- the page --------------------------------------------------------------------------------


def menu_page(
    rows: Sequence[Row], policy: str, workload: str, price: float | None, now: float, beside: Path
) -> str:
    """The document. Links of rows lead to their runs' reports, relative to `beside`."""
    unit = "of a token, baseline ×1"
    if price is not None:
        unit = f"of a million tokens, at {price:g} an hour"
    body = join(
        tag("a", "Skip to the table", href="#table", class_="skip"),
        tag(
            "header",
            tag("div", tag("span", "Headgate · menu", class_="brand"), themes(), class_="top"),
            tag("h1", "What each technique brings, and takes"),
            facts({"Policy": policy, "Workload": workload, "Cost": unit, "Measured": moment(now)}),
        ),
        tag(
            "main",
            tag("section", _trade(rows), class_="first"),
            tag(
                "section",
                tag("h2", "Every row"),
                tag(
                    "p",
                    "Each technique ran interleaved with the baseline that its changes are "
                    "against; quality is the difference of right answers with its interval.",
                    class_="lead",
                ),
                _table(rows, price, beside),
                id="table",
            ),
        ),
    )
    return document("Menu of techniques", body)


def _table(rows: Sequence[Row], price: float | None, beside: Path) -> Markup:
    head = tag("tr", *(tag("th", name, scope="col") for name in HEADINGS))
    lines = [_line(_baseline(rows, price), tag("span", "baseline"), None)]
    for row in rows:
        name = tag("span", row.name)
        if row.run:
            name = tag("a", row.name, href=_link(row.run, beside))
        lines.append(_line(cells(row, price), name, row))
    return tag("table", tag("thead", head), tag("tbody", *lines), class_="menu")


def _link(run: str, beside: Path) -> str:
    report = Path(run).absolute() / "report.html"
    return Path(os.path.relpath(report, beside.absolute())).as_posix()


def _line(values: Sequence[Cell], name: Markup, row: Row | None) -> Markup:
    said = row.said if row is not None else ""
    first = tag("th", name, tag("span", said, class_="quiet") if said else None, scope="row")
    middle = [
        tag(
            "td",
            tag("span", cell.text),
            tag("span", cell.change, class_=f"change {cell.tone}".strip()) if cell.change else None,
            data_name=heading,
            class_="none" if cell.text == _DASH else None,
        )
        for cell, heading in zip(values[1:-1], HEADINGS[1:-1], strict=True)
    ]
    empty = "none" if row is None else None
    last = tag("td", _verdict(row), data_name=HEADINGS[-1], class_=empty)
    return tag("tr", first, *middle, last)


def _verdict(row: Row | None) -> Markup:
    if row is None:
        return tag("span", _DASH)
    mark = badge(row.decision) if row.decision in SIGNS else tag("span", "Refused", class_="badge")
    return join(mark, tag("span", row.reason, class_="quiet") if row.reason else None)


def _trade(rows: Sequence[Row]) -> Markup:
    """Speed against quality: a dot for each technique, the baseline at one and nothing lost."""
    known = [
        (row, speed, row.quality) for row in rows
        if row.quality is not None and (speed := _speedup(row.figures, row.baseline)) is not None
    ]  # fmt: skip
    if not known:
        return Markup()
    margins = [row.margin for row, _, _ in known if row.margin is not None]
    x = Axis(*spread([1.0, *(speed for _, speed, _ in known)]), unit="×")
    ends = [end for _, _, quality in known for end in (quality[0], quality[2])]
    y = Axis(*spread([0.0, *ends, *margins]), unit=f"{NBSP}pp", scale=100)
    plot = Plot(x, y, height=300)
    marks = [plot.rule("zero", y=0.0), plot.rule("zero", x=1.0)]
    marks += [plot.rule("limit", y=margin, name="margin") for margin in margins[:1]]
    above = _lines_above(
        [(x.at(speed), y.at(quality[1]), row.name) for row, speed, quality in known]
    )
    for (row, speed, quality), lines in zip(known, above, strict=True):
        marks += [
            plot.whisker(speed, quality[0], quality[2], row.decision),
            plot.dot(speed, quality[1], row.decision, f"{row.name}: {_quality(row)}", radius=5),
            plot.name(speed, quality[1], row.name, lines),
        ]
    decisions = dict.fromkeys(row.decision for row, _, _ in known)
    return figure(
        "Speed against quality",
        plot.drawn(
            *marks, label=", ".join(f"{row.name} ×{speed:.2f}" for row, speed, _ in known),
            x_name="tokens a second, of the baseline's", y_name="right answers, difference",
        ),
        legend(*((f"dot {one}", TITLES[one]) for one in decisions)),
    )  # fmt: skip


def _lines_above(dots: Sequence[tuple[float, float, str]]) -> list[int]:
    """By how many lines each name has to go up so that none covers another; places in shares."""
    taken: list[tuple[float, float, float]] = []
    found = []
    for at, up, name in dots:
        width = _CHARACTER * (len(name) + 3)
        begin = at - width if at > 0.7 else at
        lines = 0
        while any(
            abs(up + lines * _LINE - one) < _LINE and begin < end and start < begin + width
            for one, start, end in taken
        ):
            lines += 1
        taken.append((up + lines * _LINE, begin, begin + width))
        found.append(lines)
    return found


def _speedup(now: Figures, was: Figures) -> float | None:
    if not now.tokens_per_s or not was.tokens_per_s:
        return None
    return now.tokens_per_s / was.tokens_per_s
