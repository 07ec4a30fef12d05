"""`headgate gate verify`, as people type it."""

from __future__ import annotations

from pathlib import Path

import click

from evals.pairs import DuplicateRows
from evals.questions import Unanswerable
from evals.verdict import USAGE_EXIT
from evals.verdict_file import BrokenRun, differences, read_rows, read_verdict, verdict_bytes


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def verify(run: Path) -> None:
    """Recompute a verdict from the rows beside it, offline.

    RUN is a run's folder, with verdict.json and pairs.jsonl.zst.

    \b
    Example:
      headgate gate verify .headgate/runs/w8a8-support-chat-0123abcd

    \b
    Exit codes:
      0  the rows say what the verdict says
      1  they do not; each difference is a line
      2  there is no such run, or it cannot be read
    """
    try:
        told, rows = read_verdict(run), read_rows(run)
        again = rows.judged()
    except (BrokenRun, DuplicateRows, Unanswerable) as error:
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    if wrong := differences(told, again):
        click.echo("\n".join(wrong), err=True)
        raise SystemExit(1)
    same = verdict_bytes(told) == verdict_bytes(again)
    how = "to the byte" if same else "but for what this processor rounds otherwise"
    count = f"{len(rows.observations):,} rows, {len(told.findings)} findings"
    click.echo(f"{told.hypothesis}: {told.decision}, as its rows say, {how} ({count})")
