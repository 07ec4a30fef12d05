"""What a benchmark is, and how its outcome is told: one JSON object, a table, a page's section.

Knows no measurement. A missed goal is an outcome, not a failure: only a measurement that could not
be made ends with another exit code than 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lab import conditions
from benchmarks.lab.conditions import Scalar

Direction = Literal["at most", "at least"]


class MeasurementFailed(Exception):
    """A number could not be had: what was tried, what happened instead, what to do."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A number to reach. The name carries the unit."""

    name: str
    goal: float
    direction: Direction
    text: str

    def met_by(self, value: float) -> bool:
        return value <= self.goal if self.direction == "at most" else value >= self.goal


@dataclass(frozen=True, slots=True)
class About:
    """What is known of a benchmark before it runs."""

    name: str  # of its module
    measures: str  # a paragraph
    goals: tuple[Goal, ...] = ()
    peers: tuple[str, ...] = ()  # other engines that have to be installed; () runs in `make bench`
    parts: tuple[str, ...] = ()  # what can be measured by itself
    more: str = ""  # what the help says besides

    @property
    def command(self) -> str:
        return f"python -m benchmarks.{self.name}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the person at the command line chose, and where progress goes."""

    quick: bool = False
    parts: tuple[str, ...] = ()  # () for all
    progress: Callable[[str], None] = field(default=lambda _: None)


@dataclass(frozen=True, slots=True)
class Measured:
    """Results as JSON will have them; a value for each goal; conditions that only the run knows.

    A goal that cannot be measured here has a reason in `not_measured` instead of a value.
    """

    results: Mapping[str, Any]
    values: Mapping[str, float]
    conditions: Mapping[str, Scalar] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)


Measure = Callable[[Settings], Measured]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["benchmark", "conditions", "results", "goals"],
    "additionalProperties": False,
    "properties": {
        "benchmark": {"type": "string", "minLength": 1},
        "conditions": {
            "type": "object",
            "required": ["date", "commit", "cpu", "cores", "load_at_start", "load_at_end", "quick"],
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
        },
        "results": {"type": "object", "minProperties": 1},
        "goals": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "value", "goal", "met"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "value": {"type": "number"},
                    "goal": {"type": "number"},
                    "met": {"type": "boolean"},
                },
            },
        },
    },
}


# ---- one run -------------------------------------------------------------------------------------


def run(about: About, measure: Measure, argv: Sequence[str] | None = None) -> int:
    """The command line of every benchmark: options, measurement, outcome. Gives the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle OpenMP threads sleep; before torch
    options = parse(about, argv)
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"{about.name} {time.monotonic() - began:6.1f} s  {text}", file=sys.stderr)

    found = conditions.gather()
    try:
        measured = measure(Settings(options.quick, tuple(options.part), progress))
    except MeasurementFailed as error:
        print(f"{about.name}: not measured: {error}", file=sys.stderr)
        return 1
    ending = {
        **measured.conditions,
        "load_at_end": conditions.load(),
        "took_s": round(time.monotonic() - began, 1),
        "quick": options.quick,
        "command": about.command,
    }
    outcome = tell(about, measured, found | ending)
    if options.json:
        print(json.dumps(outcome, allow_nan=False))
    else:
        show(about, outcome, Console())
    return 0


def parse(about: About, argv: Sequence[str] | None) -> argparse.Namespace:
    goals = "".join(f"\n  {goal.text}" for goal in about.goals) or "\n  none"
    peers = f"\nneeds, installed beside it: {', '.join(about.peers)}\n" if about.peers else ""
    more = f"\n{about.more}\n" if about.more else ""
    parser = argparse.ArgumentParser(
        prog=about.command,
        description=textwrap.fill(about.measures, 90),
        epilog=f"goals:{goals}\n{peers}{more}\nexit codes:\n"
        "  0  measured, whether or not the goals are met\n"
        "  1  not measured; stderr says why\n"
        "  2  wrong usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line, no table"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only a few repeats: shows that it works, gives no number worth quoting",
    )
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        choices=about.parts,
        help="only this part; more than once for several" if about.parts else argparse.SUPPRESS,
    )
    return parser.parse_args(argv)


def tell(about: About, measured: Measured, found: Mapping[str, Scalar]) -> dict[str, Any]:
    """The JSON object. Raises KeyError when a goal has neither value nor reason: a mistake."""
    goals = []
    for goal in about.goals:
        if goal.name in measured.not_measured:
            continue
        value = measured.values[goal.name]
        goals.append(
            {"name": goal.name, "value": value, "goal": goal.goal, "met": goal.met_by(value)}
        )
    return {
        "benchmark": about.name,
        "conditions": dict(found),
        "results": dict(measured.results) | _reasons(measured.not_measured),
        "goals": goals,
    }


def _reasons(not_measured: Mapping[str, str]) -> dict[str, Any]:
    return {"not_measured": dict(not_measured)} if not_measured else {}


# ---- for a person --------------------------------------------------------------------------------


def rows_of(results: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """One row per innermost group: its dotted name, and its numbers one after another."""
    rows: list[tuple[str, str]] = []
    own: list[str] = []
    for name, value in results.items():
        if isinstance(value, Mapping):
            rows += rows_of(value, f"{prefix}.{name}" if prefix else name)
        elif prefix:
            own.append(f"{name}: {spell(value)}")
        else:
            rows.append((name, spell(value)))
    return [(prefix, " · ".join(own)), *rows] if own else rows


def goals_of(about: About, outcome: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A row per goal: what it says, what was measured, whether that is enough."""
    texts = {goal.name: goal.text for goal in about.goals}
    return [
        (texts[told["name"]], spell(told["value"]), "met" if told["met"] else "missed")
        for told in outcome["goals"]
    ]


def spell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(spell, value))
    return str(value)


def told_conditions(found: Mapping[str, Scalar]) -> str:
    """All of them in one line, those without a value left out."""
    return " · ".join(
        f"{name} {value}"
        for name, value in found.items()
        if value is not None and name != "command"
    )


def show(about: About, outcome: Mapping[str, Any], console: Console) -> None:
    """Results and goals as tables."""
    table = Table(title=about.name, box=box.SIMPLE, title_justify="left")
    table.add_column("measured", no_wrap=True)
    table.add_column("value")
    for row in rows_of(outcome["results"]):
        table.add_row(*row)
    console.print(table)
    show_goals(goals_of(about, outcome), console)
    console.print(told_conditions(outcome["conditions"]), style="dim", highlight=False)


def show_goals(rows: Sequence[tuple[str, str, str]], console: Console) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE)
    for column in ("goal", "measured", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(*row, style=None if row[2] == "met" else "bold")
    console.print(table)


def section(about: About, outcome: Mapping[str, Any]) -> str:
    """The benchmark's part of docs/benchmarks.md."""
    lines = [f"## {about.name}", "", about.measures, "", f"    {about.command}", ""]
    if about.goals:
        lines += ["| Goal | Measured | |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in goals_of(about, outcome)]
        lines.append("")
    lines += ["| Result | Value |", "| --- | --- |"]
    lines += [f"| `{name}` | {value} |" for name, value in rows_of(outcome["results"])]
    lines += ["", f"Conditions: {told_conditions(outcome['conditions'])}.", ""]
    return "\n".join(lines)
