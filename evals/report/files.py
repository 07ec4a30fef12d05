"""Writes a run's reports beside its verdict. Knows the names of the files, not what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.report.junit import junit
from evals.report.markdown import markdown
from evals.report.page import page
from evals.verdict import Verdict
from telemetry import Observation

NAMES = ("report.html", "report.md", "junit.xml")


def write_reports(run: Path, verdict: Verdict, rows: Sequence[Observation]) -> tuple[Path, ...]:
    """`report.html`, `report.md` and `junit.xml` in the run's folder. Raises OSError."""
    texts = (page(verdict, rows), markdown(verdict, rows), junit(verdict))
    written = []
    for name, text in zip(NAMES, texts, strict=True):
        path = run / name
        # What stands there already is read by others: it is replaced whole or not at all.
        part = path.with_name(f".{name}.part")
        part.write_text(text, encoding="utf-8")
        written.append(part.replace(path))
    return tuple(written)
