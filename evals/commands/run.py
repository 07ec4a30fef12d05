"""`headgate gate run`: a hypothesis, tried; and what it came to, in words."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import click

from evals.commands.terminal import log, show
from evals.execute import Prepared, execute, prepare
from evals.journal import JournalError
from evals.progress import Progress, interval
from evals.questions import Unanswerable, placed
from evals.verdict import EXIT_CODES, USAGE_EXIT, Finding, Verdict
from policies.binding import Unknown
from policies.ledger import LedgerError
from policies.load import PolicyError

INTERRUPTED = 130


@click.command()
@click.argument("hypothesis", type=click.Path(path_type=Path))
@click.option(
    "--allow-code", is_flag=True, help="Let scorers run code that a model wrote, in a sandbox."
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def run(hypothesis: Path, allow_code: bool, as_json: bool) -> None:
    """Try HYPOTHESIS: start both configurations, ask them the same, and judge.

    What was asked and answered, and the verdict, are written to .headgate/runs beside the
    hypothesis; the ledger there gets the decision. A run that is interrupted, or killed, goes on
    where it was when the same command is given again.

    \b
    Example:
      headgate gate run policies/int8.yaml

    \b
    Exit codes:
      0    pass: nothing was lost that must not be, and something was gained
      1    fail: a loss beyond its margin is shown
      2    the hypothesis, or what it names, is wrong; each problem is printed as file:line:col
      3    inconclusive: too little is known either way; or refused before it began, since so few
           rows can show nothing: the table says what they could
      4    invalid: the run itself cannot be believed
      5    no benefit: nothing was lost, nothing was gained
      130  interrupted
    """
    try:
        plan = prepare(hypothesis, allow_code=allow_code)
        if (outlook := plan.outlook).refused:
            click.echo(outlook.table(), err=True)
            raise SystemExit(EXIT_CODES["inconclusive"])
        for warning in outlook.warnings:
            click.echo(warning, err=True)
        verdict = asyncio.run(execute(plan, log, Progress(plan.hypothesis, show)))
    except Unanswerable as error:
        click.echo(str(placed(hypothesis, error)), err=True)
        raise SystemExit(USAGE_EXIT) from None
    except (PolicyError, Unknown, JournalError, LedgerError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    except KeyboardInterrupt:
        show("")
        click.echo("interrupted; the same command goes on with it", err=True)
        raise SystemExit(INTERRUPTED) from None
    if as_json:
        click.echo(json.dumps(verdict.payload(), indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join(lines(plan, verdict)))
    raise SystemExit(verdict.exit_code)


def lines(plan: Prepared, verdict: Verdict) -> list[str]:
    """The verdict for a person, and where it all lies."""
    return [*verdict_lines(verdict), "", f"  {plan.folder}"]


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict for a person: decision, why, each question, each control."""
    reason = f" ({verdict.reason})" if verdict.reason else ""
    found = [f"{verdict.hypothesis}: {verdict.decision}{reason}"]
    found += [f"  {one}" for one in verdict.reasons]
    found += ["", *_table(verdict.findings)]
    found += [f"  {'ok ' if one.ok else 'NOT'}  {one.name}  {one.said}" for one in verdict.controls]
    return found


def _table(findings: tuple[Finding, ...]) -> list[str]:
    rows = [(one.decision, one.name, interval(one), f"{one.pairs} pairs") for one in findings]
    widths = [max((len(row[at]) for row in rows), default=0) for at in range(3)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True))
        for row in rows
    ]
