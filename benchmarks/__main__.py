"""`python -m benchmarks`: every benchmark that needs no peer, one after another, each in a process
of its own; writes docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jsonschema
from rich.console import Console

import benchmarks
from benchmarks.lab import conditions, report
from benchmarks.lab.report import SCHEMA, About, MeasurementFailed

PAGE = conditions.ROOT / "docs" / "benchmarks.md"
_OPENING = """# Benchmarks

Written by `make bench`, which runs everything on this page again; do not edit it by hand. Each
benchmark is also a command of its own, with `--json` for one JSON object as the last line.
Latencies are medians (p50) and 95th percentiles (p95). Client, gateway and worker share the cores
of one machine, and `load` is what that machine was doing beside. Numbers of different machines
cannot be compared; the conditions stand under each table.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all were measured, 1 when one was not; then the page stays as it was."""
    options = parse(argv)
    told: list[tuple[About, dict[str, Any]]] = []
    failed = []
    for about in without_peers():
        try:
            told.append((about, measure(about, quick=options.quick)))
        except MeasurementFailed as error:
            print(error, file=sys.stderr)
            failed.append(about.name)
    if not failed and not options.quick:
        PAGE.write_text(page(told), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(conditions.ROOT)}", file=sys.stderr)
    if options.json:
        print(json.dumps(together(told, quick=options.quick)))
    else:
        for about, outcome in told:
            report.show(about, outcome, Console())
    if failed:
        print(f"not measured: {', '.join(failed)}; nothing is written", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = "\n".join(f"  {about.command}" for about in without_peers())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs every benchmark that needs no peer and writes docs/benchmarks.md.",
        epilog=f"benchmarks:\n{names}\n\nexit codes:\n"
        "  0  all measured, whether or not their goals are met\n"
        "  1  one was not measured; stderr says why, docs/benchmarks.md stays as it was\n"
        "  2  wrong usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line, no tables"
    )
    parser.add_argument(
        "--quick", action="store_true", help="only a few repeats each; docs/benchmarks.md stays"
    )
    return parser.parse_args(argv)


def modules() -> list[str]:
    """The names of all benchmarks, in alphabetical order."""
    found = pkgutil.iter_modules(benchmarks.__path__)
    return sorted(one.name for one in found if not one.ispkg and one.name != "__main__")


def without_peers() -> list[About]:
    abouts = [importlib.import_module(f"benchmarks.{name}").ABOUT for name in modules()]
    return [about for about in abouts if not about.peers]


def measure(about: About, *, quick: bool) -> dict[str, Any]:
    """The outcome of a benchmark in its own process. Raises MeasurementFailed."""
    command = [sys.executable, "-m", f"benchmarks.{about.name}", "--json"]
    if quick:
        command.append("--quick")
    done = subprocess.run(
        command, cwd=conditions.ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise MeasurementFailed(f"{about.command} ended with exit code {done.returncode}")
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    jsonschema.validate(outcome, SCHEMA)
    return outcome


def page(told: Sequence[tuple[About, dict[str, Any]]]) -> str:
    sections = [report.section(about, outcome) for about, outcome in told]
    return "\n".join([_OPENING, *sections])


def together(told: Sequence[tuple[About, dict[str, Any]]], *, quick: bool) -> dict[str, Any]:
    """All outcomes as one, in the shape of one."""
    first = told[0][1]["conditions"] if told else conditions.gather()
    last = told[-1][1]["conditions"] if told else {"load_at_end": conditions.load()}
    return {
        "benchmark": "all",
        "conditions": first | {"load_at_end": last["load_at_end"], "quick": quick},
        "results": {outcome["benchmark"]: outcome["results"] for _, outcome in told},
        "goals": [
            goal | {"name": f"{outcome['benchmark']}.{goal['name']}"}
            for _, outcome in told
            for goal in outcome["goals"]
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
