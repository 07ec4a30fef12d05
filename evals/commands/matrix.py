"""`headgate gate matrix`, as people type it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import click

from evals.arms import beside
from evals.design import Step
from evals.journal import Done, JournalError
from evals.stack import execute, prepare
from evals.verdict import USAGE_EXIT
from policies.load import PolicyError

MATRIX_FILE = "matrix.json"
_INTERRUPTED = 130


@click.command()
@click.argument("hypotheses", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for what was asked and answered. Default: .headgate beside the first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def matrix(hypotheses: tuple[Path, ...], state: Path | None, as_json: bool) -> None:
    """Try all HYPOTHESES together, and all but each: what does each add to the others?

    A pass of A and a pass of B say nothing of both at once. For k changes of one policy k + 2
    servers run: none of them, all, and all but each. The table has the effect of each change on top
    of the others, of all together, and what they do only together: the sum of the former less the
    latter, which is nothing where each adds what it adds alone. It is no verdict: that of all
    together is a hypothesis of its own. Design and statistics are those of the first file.

    \b
    Example:
      headgate gate matrix policies/int8.yaml policies/ngram.yaml

    \b
    Exit codes:
      0    measured
      2    a hypothesis is wrong, or they cannot be stacked; each problem is printed
      130  interrupted; the same command goes on with it
    """
    if len(hypotheses) < 2:
        raise click.UsageError("give at least two hypotheses: one alone is `headgate gate run`")
    try:
        stack = prepare(hypotheses)
        folder = (state or hypotheses[0].absolute().parent / ".headgate") / "matrix" / stack.name
        found = asyncio.run(execute(stack, folder, beside, _Counted(len(stack.steps)).after))
    except (PolicyError, JournalError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    except KeyboardInterrupt:
        click.echo("\ninterrupted; the same command goes on with it", err=True)
        raise SystemExit(_INTERRUPTED) from None
    text = json.dumps(found.payload(), indent=1)
    (folder / MATRIX_FILE).write_text(text + "\n", encoding="utf-8")
    click.echo(text if as_json else f"{found.table()}\n\n{folder}")


class _Counted:
    """Shows how far it is, where somebody watches."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0

    def after(self, _step: Step, _done: Done) -> str | None:
        self._done += 1
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[K{self._done} of {self._steps} blocks", nl=False, err=True)
        return None
