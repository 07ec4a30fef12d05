"""`headgate gate plan`, as people type it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import click

from evals.activation import refuse_uncounted
from evals.commands.report import find_run
from evals.commands.terminal import Share
from evals.needs import Noise, measured, supply_of
from evals.pairs import AA, BASELINE, CANDIDATE, by_arm, pair, pair_control
from evals.plan import Plan, plan
from evals.questions import asked_in
from evals.reach import assumed, of_pairs, of_rows
from evals.sources import read_sources
from evals.strata import Reach, traces
from evals.verdict import EXIT_CODES, USAGE_EXIT
from evals.verdict_file import BrokenRun, read_rows
from policies.hypothesis import Hypothesis
from policies.load import PolicyError, load_hypothesis
from policies.patching import spelled_out, variants


@click.command("plan")
@click.argument("hypothesis", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "run",
    type=click.Path(path_type=Path),
    help="A run's folder: its second baseline tells how noisy each metric is.",
)
@click.option(
    "--flips",
    type=Share(),
    help="Share of rows that change between right and wrong by chance. Default: 0.06.",
)
@click.option(
    "--exposed",
    type=Share(),
    help="Share of the requests that the change will touch. Default: what is known without a run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def show_plan(
    hypothesis: Path, run: Path | None, flips: float | None, exposed: float | None, as_json: bool
) -> None:
    """Say what HYPOTHESIS could show with the rows that there are, before anything is spent.

    For each guardrail: how many pairs it needs to pass if nothing is lost, how many there are, and
    the smallest margin that can be tested with these. Where a change touches only some requests,
    the same for these, as far as prompts, repeated questions or the last run say how many.

    \b
    Examples:
      headgate gate plan policies/int8.yaml
      headgate gate plan policies/int8.yaml --from .headgate/runs/int8-0123abcd

    \b
    Exit codes:
      0  every guardrail can be shown
      2  the hypothesis, or what it names, is wrong; each problem is printed as file:line:col
      3  refused: some guardrail could not pass even if nothing is lost, or nothing is touched
    """
    try:
        asked = load_hypothesis(hypothesis)
        made = planned(hypothesis, asked, run, flips, exposed)
    except (PolicyError, BrokenRun) as error:
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    click.echo(json.dumps(made.payload(), indent=2) if as_json else made.table())
    raise SystemExit(EXIT_CODES["inconclusive"] if made.refused else 0)


def planned(
    file: Path, asked: Hypothesis, run: Path | None, flips: float | None, exposed: float | None
) -> Plan:
    """Raises PolicyError, BrokenRun."""
    questions = asked_in(file, asked)
    # what is wrong with the two configurations is told here already
    configured = variants(file, asked)
    refuse_uncounted(file, asked, configured[1])
    asked = spelled_out(asked, configured)
    sources = read_sources(file, asked)
    supplies = {one.name: supply_of(one.blocks) for one in sources}
    noise: dict[str, Noise] = {}
    if flips is not None:
        noise = {one.name: Noise(flips=flips) for one in questions}
    arms = {} if run is None else by_arm(read_rows(run).observations)
    base = arms.get(BASELINE, [])
    if run is not None:
        noise |= measured(asked, pair_control(base, arms.get(AA, [])))
    rows = {name: one.rows for name, one in supplies.items()}
    if exposed is not None:
        reach = assumed(rows, exposed)
    elif run is not None:
        pairs = pair(base, arms.get(CANDIDATE, []))
        reach = of_pairs(asked, pairs, rows, "asked", f"as many as in {run}")
    else:
        reach = (*of_rows(asked, configured, sources), *_earlier(file, asked, rows))
    return plan(asked, supplies, noise, reach)


def _earlier(file: Path, asked: Hypothesis, rows: Mapping[str, int]) -> tuple[Reach, ...]:
    """Of the newest run of the hypothesis, where it compared the same two configurations."""
    if not traces(asked):
        return ()
    try:
        found = read_rows(run := find_run(file))
    except BrokenRun:
        return ()
    before = found.hypothesis
    if (before.baseline, before.candidate) != (asked.baseline, asked.candidate):
        return ()
    arms = by_arm(found.observations)
    pairs = pair(arms.get(BASELINE, []), arms.get(CANDIDATE, []))
    when = f"{datetime.fromtimestamp(found.now, UTC):%Y-%m-%d}"
    return of_pairs(asked, pairs, rows, "run", f"as many as on {when} in {run.name}")
