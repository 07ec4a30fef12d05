"""What a scrape of a gateway costs it, and how long streams wait for one: by models, by format, and
by the processes that one page tells of.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.lab.conditions import ROOT
from benchmarks.lab.report import About, Goal, Measured, MeasurementFailed, Settings, run

_ROUNDS, _PAGES = 3, 20
_END_S = 60.0
PLAIN, OPEN = "plain", "openmetrics"
# Models, format, processes.
CASES = (
    *((models, form, 1) for models in (1, 8, 64) for form in (PLAIN, OPEN)),
    *((models, form, 3) for models in (8, 64) for form in (PLAIN, OPEN)),
)

ABOUT = About(
    name="scrape",
    measures=(
        "A gateway with four tiers and four replicas, each of whose series of each model has a "
        "count and an exemplar in every bucket, writes its page of metrics; with three processes "
        "the one that is asked puts the others' samples beside its own. `cpu_ms` is CPU time of "
        "the process that is asked, for one page, `siblings_cpu_ms` that of the others together; "
        "`held_ms` is the most that the event loop's thread worked, in CPU time, between two turns "
        "of somebody who always wants one, as streams do, during one page, and `wait_ms` the "
        "longest time between two such turns, other programs on the same cores counted in (medians "
        "of the pages); `page_ms` is how long a page took while nobody else wanted the loop. "
        "Medians of the rounds, in which the cases take turns."
    ),
    goals=(
        Goal("cpu_ms", 10.0, "at most", "8 models, plain: at most 10 ms of CPU in who is asked"),
        Goal("held_ms", 5.0, "at most", "no page keeps the loop from streams for more than 5 ms"),
    ),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    rounds, pages = (1, 5) if settings.quick else (_ROUNDS, _PAGES)
    for number in range(rounds):
        for models, form, processes in CASES:
            name = f"{models}_{form}" + (f"_{processes}_processes" if processes > 1 else "")
            rows[name].append(_case(models, form, processes, pages))
        settings.progress(f"round {number + 1} of {rounds}")
    results = {
        name: {what: round(median(one[what] for one in found), 2) for what in found[0]}
        for name, found in rows.items()
    }
    values = {
        "cpu_ms": max(results[name]["cpu_ms"] for name in ("8_plain", "8_plain_3_processes")),
        "held_ms": max(row["held_ms"] for row in results.values()),
    }
    return Measured(results, values, {"rounds": rounds, "pages": pages})


def _case(models: int, form: str, processes: int, pages: int) -> dict[str, float]:
    """All processes from their start to their end."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="headgate-")))
        words = ["--folder", str(folder), "--of", str(processes), "--models", str(models)]
        words += ["--pages", str(pages), *(["--openmetrics"] if form == OPEN else [])]
        asked, *others = [
            stack.enter_context(_process([*words, "--process", str(at)])) for at in range(processes)
        ]
        told = _end(asked, "\n")
        more = [_end(one, "")["cpu_s"] for one in others]
    if others:
        told["siblings_cpu_ms"] = 1e3 * sum(more) / (2 * pages + 1)
    return told


@contextmanager
def _process(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """One that is ready."""
    command = [sys.executable, "-m", "benchmarks.lab.scraped", *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise MeasurementFailed(f"{' '.join(command)} did not start: its words are above")
            yield process
        finally:
            process.kill()


def _end(process: subprocess.Popen[str], word: str) -> dict[str, Any]:
    """What it says when it has heard this and its input has ended."""
    said, _ = process.communicate(word, timeout=_END_S)
    if not said:
        raise MeasurementFailed("a process of the measurement has died: its words are above")
    told: dict[str, Any] = json.loads(said)
    return told


if __name__ == "__main__":
    sys.exit(main())
