"""`headgate menu`: techniques and their sums, each measured against a policy on one's workload."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from evals.commands.terminal import Share, log, show
from evals.execute import Prepared, execute, prepare
from evals.journal import JournalError
from evals.menu import Row, Workload, hypothesis_of, refused, row_of
from evals.progress import Progress
from evals.questions import Unanswerable, named
from evals.report.files import write_reports
from evals.report.menu import menu_page, terminal
from evals.residence import measure_memory, read_memory
from evals.techniques import NAMED, NoTechnique, Technique, combinations, technique
from evals.verdict import USAGE_EXIT
from evals.verdict_file import VERDICT_FILE, BrokenRun, read_rows, read_verdict
from policies.binding import Unknown
from policies.ledger import LedgerError
from policies.load import PolicyError, load

Measure = Callable[[Prepared], Awaitable[None]]

# What can be wrong with a row and leaves the others as they are.
_WRONG = (PolicyError, Unanswerable, Unknown, JournalError, LedgerError, BrokenRun)
_FOLDER, _PAGE, _DATA = "menu", "menu.html", "menu.json"


@dataclass(frozen=True, slots=True)
class Options:
    policy: Path
    workload: Workload
    price: float | None
    again: bool

    @property
    def folder(self) -> Path:
        """Beside the policy: hypotheses, table, page, and the runs' own folder."""
        return _folder(self.policy)


@click.command(short_help="Measure techniques and their combinations on your own workload.")
@click.argument("policy", type=click.Path(path_type=Path))
@click.option("--try", "asked", multiple=True, help="A technique, see above; may be given again.")
@click.option("--combine", is_flag=True, help="Also try every combination of those.")
@click.option("--suite", "suites", multiple=True, help="Suite, by name or file.")
@click.option("--replay", "replays", multiple=True, help="Recorded traffic, by its file.")
@click.option(
    "--margin",
    type=Share(above=0.0),
    default="2%",
    show_default=True,
    help="Right answers that may be lost.",
)
@click.option(
    "--max-pairs",
    default=1000,
    show_default=True,
    type=click.IntRange(10),
    help="Rows of each suite and replay.",
)
@click.option(
    "--concurrency",
    default=4,
    show_default=True,
    type=click.IntRange(1, 1024),
    help="Requests of a suite under way at once.",
)
@click.option("--price", type=click.FloatRange(0), help="Of an hour of the machine; else relative.")
@click.option("--again", is_flag=True, help="Measure again what was measured before.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def menu(
    policy: Path,
    asked: tuple[str, ...],
    combine: bool,
    suites: tuple[str, ...],
    replays: tuple[str, ...],
    margin: float,
    max_pairs: int,
    concurrency: int,
    price: float | None,
    again: bool,
    as_json: bool,
) -> None:
    """Measure what techniques bring and take: a row for each, beside POLICY as it is.

    Each row is a gate's run: its hypothesis is written to the folder menu beside the policy, and
    its verdict counts as any other. The table is also written as a page, menu/menu.html, and as
    JSON. Rows that were measured before are read, not run again.

    A technique is one of bf16, chunked-prefill, compiled, draft, int4, int8-kv, ngram,
    no-speculation, response-cache, sliding-trim, tree, trim, two-workers, w8, w8a8, whole-prefill;
    or a knob and its value, such as runtime.kv=int8; or a hypothesis file, of which the patch is
    taken; or a sum of these.

    \b
    Examples:
      headgate menu my-policy.yaml --suite my-suite.yaml --try w8a8 --try ngram --combine
      headgate menu my-policy.yaml --replay traffic/ --try w8a8+int8-kv --price 2.5

    \b
    Exit codes:
      0    every row was measured, whatever came of it
      1    at least one could not be measured; the table says why
      2    wrong usage, a wrong policy, or no such technique
      130  interrupted; the same command goes on
    """
    folder = _folder(policy)
    workload = Workload(
        tuple(_seen_from(folder, one) for one in suites),
        tuple(_seen_from(folder, one) for one in replays),
        margin,
        concurrency=concurrency,
        max_pairs=max_pairs,
    )
    options = Options(policy, workload, price, again)
    try:
        load(policy)
        techniques = _techniques(options, asked, combine=combine)
        rows = asyncio.run(measured(options, techniques, run_row))
    except (NoTechnique, PolicyError, Unmeasurable) as error:
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on with it", err=True)
        raise SystemExit(130) from None
    click.echo(tell(options, rows, as_json=as_json))
    log(str(options.folder / _PAGE))
    raise SystemExit(any(row.decision == "refused" for row in rows))


def _techniques(options: Options, asked: Sequence[str], *, combine: bool) -> list[Technique]:
    """Each once. Raises NoTechnique."""
    if not options.workload.suites and not options.workload.replays:
        raise NoTechnique("nothing to measure on: give --suite, --replay, or both")
    if not asked:
        raise NoTechnique(f"nothing to try: give --try, such as {', '.join(NAMED)}")
    found = [technique(one, options.policy.absolute().parent) for one in asked]
    if combine:
        found += combinations([one for one in found if len(one.parts) == 1])
    return list({tuple(sorted(one.parts)): one for one in found}.values())


async def measured(
    options: Options, techniques: Sequence[Technique], measure: Measure
) -> list[Row]:
    """A row for each; one that cannot be measured says why, before any other is.

    Raises Unmeasurable where none of them can be. The table is written after each."""
    options.folder.mkdir(parents=True, exist_ok=True)
    plans = [_planned(options, one) for one in techniques]
    wrong = list(dict.fromkeys(one for one in plans if isinstance(one, str)))
    if len(wrong) and all(isinstance(one, str) for one in plans):
        raise Unmeasurable("\n".join(wrong))
    rows = []
    for number, (one, plan) in enumerate(zip(techniques, plans, strict=True), start=1):
        log(f"[{number}/{len(techniques)}] {one.name}: {one.said}".rstrip(": "))
        began = time.monotonic()
        row = (
            refused(one, plan) if isinstance(plan, str) else await _row(options, one, plan, measure)
        )
        rows.append(row)
        write_table(options, rows)
        log(f"  {row.decision} after {time.monotonic() - began:.0f} s: {row.reason}".rstrip(": "))
    return rows


class Unmeasurable(Exception):
    """What is wrong with every row that was asked for."""


def _planned(options: Options, one: Technique) -> Prepared | str:
    """What measures it, from a file that is written for it; or what is wrong with that."""
    file = options.folder / f"{one.file_name}.yaml"
    content = hypothesis_of(one, _seen_from(options.folder, options.policy), options.workload)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    try:
        return prepare(file)
    except _WRONG as error:
        return str(error)


async def _row(options: Options, one: Technique, plan: Prepared, measure: Measure) -> Row:
    try:
        if options.again or not _same(plan):
            await measure(plan)
        verdict, seen = read_verdict(plan.folder), read_rows(plan.folder).observations
    except _WRONG as error:
        return refused(one, str(error))
    write_reports(plan.folder, verdict, seen)
    memory = read_memory(plan)
    return row_of(one, verdict, seen, str(plan.folder), memory, options.price)


async def run_row(plan: Prepared) -> None:
    """The gate's run, and what memory both arms take."""
    await execute(plan, log, Progress(plan.hypothesis, show))
    await measure_memory(plan)


def _same(plan: Prepared) -> bool:
    """Whether a verdict that counts is there, of exactly these two configurations."""
    if not (plan.folder / VERDICT_FILE).exists():
        return False
    verdict = read_verdict(plan.folder)
    return verdict.decision != "invalid" and (
        verdict.baseline.root,
        verdict.candidate.root,
    ) == tuple(side.root for side in plan.sides)


def write_table(options: Options, rows: Sequence[Row]) -> str:
    """The page, and the JSON that it returns."""
    data = json.dumps([row.payload() for row in rows], indent=1, ensure_ascii=False)
    (options.folder / _DATA).write_text(data, encoding="utf-8")
    sources = ", ".join(map(named, (*options.workload.suites, *options.workload.replays)))
    page = menu_page(rows, str(options.policy), sources, options.price, time.time(), options.folder)
    (options.folder / _PAGE).write_text(page, encoding="utf-8")
    return data


def tell(options: Options, rows: Sequence[Row], *, as_json: bool) -> str:
    """Writes page and JSON, and says what is printed."""
    data = write_table(options, rows)
    return data if as_json else "\n".join(terminal(rows, options.price))


def _folder(policy: Path) -> Path:
    return policy.resolve().parent / _FOLDER


def _seen_from(folder: Path, name: str | Path) -> str:
    """A file's path from there; what is no file is the name of something that ships."""
    if not Path(name).exists():
        return str(name)
    return Path(os.path.relpath(Path(name).resolve(), folder)).as_posix()
