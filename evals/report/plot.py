"""Drawings that keep their type size at every width: positions in per cent, strokes in pixels.

Knows axes, lines and dots, not what they mean. Colours come from the page by class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evals.report.markup import Markup, join, tag

_WHOLE = 1000  # units of the inner drawing that is stretched
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to a share of its length, linear or by logarithm. `low` < `high`; a log is > 0."""

    low: float
    high: float
    log: bool = False
    unit: str = ""
    scale: float = 1.0  # of the values that labels show: 100 for per cent
    whole: bool = False  # counts: no label between two of them

    def at(self, value: float) -> float:
        """Where a value stands, kept within the axis."""
        low, high, value = (self._flat(one) for one in (self.low, self.high, value))
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def _flat(self, value: float) -> float:
        if not self.log:
            return value
        return math.log(value) if value > 0 else math.log(self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the axis, about as many as asked for."""
        if self.log and self.high / self.low >= 8:
            return self._decades(count)
        low, high = self.low * self.scale, self.high * self.scale
        step = _step((high - low) / count)
        if self.whole:
            step = max(math.ceil(step), 1)
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        return [at * step / self.scale for at in range(first, last + 1)]

    def _decades(self, count: int) -> list[float]:
        low, high = (math.log10(one * self.scale) for one in (self.low, self.high))
        steps = (1.0, 2.0, 5.0) if high - low <= count / 2 else (1.0,)
        stride = max(1, round((high - low) / count)) if len(steps) == 1 else 1
        found = [
            step * 10.0**decade / self.scale
            for decade in range(math.floor(low), math.ceil(high) + 1)
            for step in steps
            if decade % stride == 0
        ]
        return [one for one in found if self.low * 0.999 <= one <= self.high * 1.001]

    def name(self, value: float) -> str:
        shown = value * self.scale
        if self.log and (shown >= 1e4 or shown <= 1e-2):
            power = math.floor(math.log10(shown) + 1e-9)
            times = "" if abs(shown / 10.0**power - 1) < 1e-6 else f"{shown / 10.0**power:.3g}·"
            return f"{times}10{str(power).translate(_RAISED)}{self.unit}"
        return f"{shown:.4g}".replace("-", "−") + self.unit


def _step(rough: float) -> float:
    """The round step next above."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(nice * power for nice in _NICE if nice * power >= rough * 0.999)


def spread(
    values: Iterable[float], *, log: bool = False, room: float = 0.06
) -> tuple[float, float]:
    """Ends of an axis that holds all values, with a little room at both."""
    finite = [one for one in values if math.isfinite(one) and (one > 0 or not log)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    if log:
        factor = max((high / low) ** room, 1.02)
        return low / factor, high * factor
    extra = (high - low) * room or abs(high) * room or room
    return low - extra, high + extra


@dataclass(frozen=True, slots=True)
class Plot:
    """A field between two axes. Its methods give marks; `drawn` puts them into one picture."""

    x: Axis
    y: Axis
    height: int = 240

    def curve(self, points: Sequence[Point], class_: str) -> Markup:
        """A line through the points."""
        return self._stretched(tag("path", d=self._path(points), class_=f"line {class_}"))

    def band(self, lower: Sequence[Point], upper: Sequence[Point], class_: str) -> Markup:
        """The area between two lines."""
        outline = self._path([*lower, *reversed(upper)]) + "Z"
        return self._stretched(tag("path", d=outline, class_=f"area {class_}"))

    def _path(self, points: Sequence[Point]) -> str:
        places = (
            f"{_WHOLE * self.x.at(x):.1f} {_WHOLE * (1 - self.y.at(y)):.1f}" for x, y in points
        )
        return "M" + "L".join(places)

    def _stretched(self, mark: Markup) -> Markup:
        return tag(
            "svg", mark, width="100%", height="100%", viewBox=f"0 0 {_WHOLE} {_WHOLE}",
            preserveAspectRatio="none",
        )  # fmt: skip

    def dot(self, x: float, y: float, class_: str, title: str = "", radius: float = 3.5) -> Markup:
        said = tag("title", title) if title else None
        return tag(
            "circle", said, cx=self._left(x), cy=self._top(y), r=radius, class_=f"dot {class_}"
        )

    def whisker(self, x: float, low: float, high: float, class_: str) -> Markup:
        """An upright interval."""
        at = self._left(x)
        return tag(
            "line", x1=at, x2=at, y1=self._top(low), y2=self._top(high), class_=f"whisker {class_}"
        )

    def name(self, x: float, y: float, text: str, lines: int = 0) -> Markup:
        """Words beside a dot, on the side where there is room, or so many lines above."""
        right = self.x.at(x) > 0.7
        return tag(
            "text",
            text,
            x=self._left(x),
            y=self._top(y),
            dx=-10 if right else 10,
            dy=f"{0.32 - 1.2 * lines:.2f}em",
            class_="note named",
            text_anchor="end" if right else "start",
        )

    def rule(
        self,
        class_: str,
        *,
        x: float | None = None,
        y: float | None = None,
        name: str = "",
        start: bool = False,
    ) -> Markup:
        """A line right across at one value, with its name at its end or its start."""
        if x is not None:
            at = self._left(x)
            line = tag("line", x1=at, x2=at, y1="0", y2="100%", class_=f"rule {class_}")
            # The name stays inside: to the left of a line in the right half.
            right = self.x.at(x) > 0.5
            side = {"dx": -6, "text_anchor": "end"} if right else {"dx": 6}
            text = tag("text", name, x=at, y=self.height - 10, class_=f"note {class_}", **side)
        else:
            at = self._top(0.0 if y is None else y)
            line = tag("line", x1="0", x2="100%", y1=at, y2=at, class_=f"rule {class_}")
            end = {"x": "0", "dx": 6} if start else {"x": "100%", "text_anchor": "end"}
            text = tag("text", name, y=at, dy=-5, class_=f"note {class_}", **end)
        return join(line, text if name else None)

    def _left(self, x: float) -> str:
        return f"{100 * self.x.at(x):.2f}%"

    def _top(self, y: float) -> str:
        return f"{100 * (1 - self.y.at(y)):.2f}%"

    def drawn(self, *marks: Markup, label: str, x_name: str, y_name: str) -> Markup:
        """The picture with its axes. `label` says in words what it shows."""
        picture = tag("svg", self._grid(), *marks, role="img", aria_label=label, height=self.height)
        return tag(
            "div",
            tag("div", y_name, class_="y-name", aria_hidden="true"),
            tag("div", picture, class_="field"),
            tag("div", x_name, class_="x-name", aria_hidden="true"),
            class_="plot",
        )

    def _grid(self) -> Markup:
        lines = []
        for value in self.y.ticks(4):
            at = self._top(value)
            lines += [
                tag("line", x1="0", x2="100%", y1=at, y2=at, class_="grid"),
                tag("text", self.y.name(value), x=-8, y=at, dy="0.32em", class_="tick y"),
            ]
        for value in self.x.ticks():
            at = self._left(value)
            lines += [
                tag("line", x1=at, x2=at, y1="100%", y2=self.height + 5, class_="axis"),
                tag("text", self.x.name(value), x=at, y=self.height + 18, class_="tick x"),
            ]
        lines.append(tag("line", x1="0", x2="100%", y1="100%", y2="100%", class_="axis"))
        return join(*lines)


def legend(*entries: tuple[str, str]) -> Markup:
    """Class and name of what a picture shows, under it."""
    return tag(
        "ul",
        *(tag("li", tag("i", class_=f"key {class_}"), name) for class_, name in entries),
        class_="legend",
    )


def figure(heading: str, picture: Markup, *said: Markup | str | None, class_: str = "") -> Markup:
    """A picture with its heading above and what it says below."""
    return tag(
        "figure",
        tag("figcaption", tag("h3", heading)),
        picture,
        *(one if isinstance(one, Markup) else tag("p", one) for one in said if one),
        class_=class_ or None,
    )
