"""`headgate gate suite`: a task of another tool as a suite of ours."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import click

from evals.adapters.inspect_run import Program, Refused
from evals.adapters.inspect_task import Taken, take
from evals.commands.terminal import log
from evals.verdict import USAGE_EXIT
from policies.load import PolicyError


@click.command()
@click.argument("task")
@click.option(
    "--from",
    "tool",
    type=click.Choice(["inspect"]),
    required=True,
    expose_value=False,
    help="The tool.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder of the suite's two files. Default: this one.",
)
@click.option("--cluster", help="Field of the samples' metadata with their document.")
@click.option("-T", "arguments", multiple=True, metavar="NAME=VALUE", help="Argument of the task.")
@click.option("--limit", type=click.IntRange(1), help="So many samples only.")
@click.option("--inspect", "program", default="inspect", help="The program. Default: on the PATH.")
@click.option("--replace", is_flag=True, help="Write over a suite of the same name.")
def suite(
    task: str, out: Path, cluster: str | None, arguments: tuple[str, ...],
    limit: int | None, program: str, replace: bool,
) -> None:  # fmt: skip
    """Make a suite of TASK, as `inspect eval` names it: FILE, FILE@TASK, or one that is installed.

    The task runs twice in your own installation, against a server that answers as this command
    tells it: once to hear what is asked for each sample, solvers and all, and once to hear how the
    task's scorers judge answers that are right, wrong, or both. Scorers of ours that judge all of
    them alike are taken; others are left out and named. A task that asks more than once for a
    sample, or uses tools, is refused: compare two of its logs instead (`headgate gate compare`).

    \b
    Examples:
      headgate gate suite evals/support.py@facts --from inspect --out suites/
      headgate gate suite inspect_evals/gsm8k --from inspect --limit 500 --cluster document

    \b
    Exit codes:
      0  written
      2  the task cannot be a suite, or cannot be run; nothing is written
    """
    if (found := shutil.which(program)) is None:
        _refuse(
            f"{program} is not here: activate the environment that has inspect_ai, or name the "
            "program with --inspect"
        )
    try:
        asked = Program(str(found), task, arguments, limit)
        with tempfile.TemporaryDirectory() as scratch:
            taken = asyncio.run(take(asked, Path(scratch)))
            _tell(taken)
            if not any(one.holds for one in taken.scorers):
                _refuse("no scorer of ours judges as this task does; nothing is written")
            file = out / f"{taken.name}.yaml"
            if file.exists() and not replace:
                _refuse(f"{file}  is there already; --replace writes over it")
            taken.write(out, cluster, task)
    except (Refused, PolicyError, OSError) as error:
        _refuse(str(error))
    if taken.epochs > 1:
        log(f"the task asks {taken.epochs} times; a hypothesis does with design.repeats")
    click.echo(str(file))


def _tell(taken: Taken) -> None:
    log(f"{taken.name}: {len(taken.rows)} rows (inspect_ai {taken.version})")
    for one in taken.scorers:
        log(f"  {one.scorer.name}: {one.told()}")


def _refuse(why: str) -> None:
    click.echo(why, err=True)
    raise SystemExit(USAGE_EXIT)
