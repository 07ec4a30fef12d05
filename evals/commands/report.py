"""`headgate gate report`: a run's verdict as a page, as Markdown and as JUnit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from evals.report.junit import junit
from evals.report.markdown import markdown
from evals.report.page import page
from evals.verdict import USAGE_EXIT, Verdict
from evals.verdict_file import PAIRS_FILE, VERDICT_FILE, BrokenRun, read_rows, read_verdict
from telemetry import Observation

_FORMS: dict[str, Callable[[Verdict, Sequence[Observation]], str]] = {
    "html": page,
    "md": markdown,
    "junit": lambda verdict, _rows: junit(verdict),
}


@click.command(short_help="Write a run's verdict as a page, as Markdown and as JUnit.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--print", "form", type=click.Choice([*_FORMS]), help="Print this one, and write no file."
)
def report(run: Path, form: str | None) -> None:
    """Write report.html, report.md and junit.xml beside a run's verdict.

    RUN is the folder that `headgate gate run` names, its verdict.json, or the hypothesis: then its
    newest run. The page is one file that loads nothing; where pairs.jsonl.zst is not there, it
    comes without the pictures of answers and times.

    \b
    Examples:
      headgate gate report policies/int8.yaml
      headgate gate report .headgate/runs/int8-1a2b3c4d --print md >> "$GITHUB_STEP_SUMMARY"

    \b
    Exit codes:
      0  written, whatever the verdict says
      2  no run, or one that cannot be read
    """
    from evals.report.files import write_reports

    try:
        folder = find_run(run)
        verdict = read_verdict(folder)
        rows = read_rows(folder).observations if (folder / PAIRS_FILE).exists() else ()
    except BrokenRun as error:
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    if form is not None:
        click.echo(_FORMS[form](verdict, rows), nl=False)
        return
    for path in write_reports(folder, verdict, rows):
        click.echo(path)


def find_run(path: Path) -> Path:
    """A folder itself, its verdict's, or the newest run of a hypothesis. Raises BrokenRun."""
    if path.is_dir():
        return path
    if path.name == VERDICT_FILE:
        return path.parent
    name, runs = _name(path), path.parent / ".headgate" / "runs"
    found = [
        (file.stat().st_mtime, file.parent)
        for file in runs.glob(f"*/{VERDICT_FILE}")
        if file.parent.name.rpartition("-")[0] == name  # then come eight digits of its evidence
    ]
    if not found:
        raise BrokenRun(
            f"{path}: no run of it under {runs}; expected a run's folder, or a hypothesis that "
            f"has been run: headgate gate run {path}"
        )
    return max(found)[1]


def _name(hypothesis: Path) -> str:
    from policies.load import PolicyError, load_hypothesis

    try:
        return load_hypothesis(hypothesis).metadata.name
    except PolicyError as error:
        raise BrokenRun(str(error)) from None
