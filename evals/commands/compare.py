"""`headgate gate compare`: two runs of another tool, judged as pairs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from evals.adapters import LOADS, READERS, EmptyRun, NoRun, Run
from evals.commands.run import verdict_lines
from evals.controls import Facts
from evals.pairs import BASELINE, CANDIDATE, DuplicateRows
from evals.questions import Unanswerable
from evals.verdict import EXIT_CODES, USAGE_EXIT, Side
from evals.verdict_file import Rows, write_run
from policies.hypothesis import Hypothesis
from policies.load import PolicyError, load_hypothesis
from telemetry import Observation

# What a tool's run is asked where nobody says: whether answers, or requests and times, got worse.
_TIMES = ("ttft.p95", "tpot.p95", "e2e.p95")


@click.command()
@click.argument("baseline", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--from", "tool", type=click.Choice(list(READERS)), required=True, help="The tool.")
@click.option(
    "--metric", "metrics", multiple=True, help="What must not get worse. May be repeated."
)
@click.option(
    "--margin", default=None, help="Largest acceptable loss. Default: 2% of answers, 10% of times."
)
@click.option("--cluster", help="Field of the rows with their conversation or document.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, 0.2, min_open=True),
    default=0.05,
    show_default=True,
    help="Probability with which what loses the margin may pass.",
)
@click.option(
    "--hypothesis",
    type=click.Path(path_type=Path),
    help="Take claims, guardrails and statistics from this file instead.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write verdict.json and pairs.jsonl.zst there, for `gate report` and `gate verify`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def compare(
    baseline: Path, candidate: Path, tool: str, metrics: tuple[str, ...], margin: str | None,
    cluster: str | None, alpha: float, hypothesis: Path | None, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare two runs of another tool: BASELINE and CANDIDATE, files or folders of them.

    Rows are paired by what they asked, failures count as losses, and only what is shown passes.
    Times need ten runs of each or more, in turns: give folders. Nothing is recorded in the
    ledger, since such runs do not say what exactly answered.

    \b
    Examples:
      headgate gate compare logs/base.eval logs/int8.eval --from inspect
      headgate gate compare base/ int8/ --from lm-eval --metric exact_match --margin 1%
      headgate gate compare base.json int8.json --from guidellm --out runs/int8

    \b
    Exit codes:
      0  pass: nothing was lost that must not be
      1  fail: a loss beyond its margin is shown
      2  wrong usage, or a file that the tool did not write; told as file:line
      3  inconclusive: too little is known either way
      4  invalid: a run answered nothing, or next to nothing
      5  no benefit: the hypothesis claims a gain that is not shown
    """
    try:
        runs = [
            READERS[tool](path, arm, cluster)
            for path, arm in ((baseline, BASELINE), (candidate, CANDIDATE))
        ]
        asked = _asked(hypothesis, runs, (baseline, candidate), tool, metrics, margin, alpha)
        rows = _rows(asked, runs, tool)
        verdict = write_run(out, rows) if out is not None else rows.judged()
    except EmptyRun as error:
        click.echo(f"invalid: {error}", err=True)
        raise SystemExit(EXIT_CODES["invalid"]) from None
    except (NoRun, PolicyError, DuplicateRows, Unanswerable, _Misasked) as error:
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    if as_json:
        click.echo(json.dumps(verdict.payload(), indent=1, ensure_ascii=False))
    else:
        where = [f"  {out}"] if out is not None else []
        click.echo("\n".join([*verdict_lines(verdict), "", *where]).rstrip())
    raise SystemExit(verdict.exit_code)


class _Misasked(Exception):
    """A question that these two runs cannot be asked."""


def _asked(
    file: Path | None,
    runs: Sequence[Run],
    paths: tuple[Path, Path],
    tool: str,
    metrics: tuple[str, ...],
    margin: str | None,
    alpha: float,
) -> Hypothesis:
    """What is asked of the two runs: as the file says, or that nothing got worse."""
    sources = sorted({one.source for run in runs for one in run.observations})
    if paths[0].resolve() == paths[1].resolve():
        raise _Misasked(f"{paths[0]} is given twice: there is nothing to compare")
    if file is None:
        return _default(runs[0], sources, paths, tool, metrics, margin, alpha)
    asked = load_hypothesis(file)
    if foreign := sorted(set(asked.sources) - set(sources)):
        there = ", ".join(sources)
        raise _Misasked(f"{file}  asks of {', '.join(foreign)}, and the runs have {there}")
    alone = asked.design.model_copy(update={"aa_control": False, "sabotage_control": False})
    return asked.model_copy(update={"design": alone, "activation": ()})


def _default(
    run: Run,
    sources: Sequence[str],
    paths: tuple[Path, Path],
    tool: str,
    metrics: tuple[str, ...],
    margin: str | None,
    alpha: float,
) -> Hypothesis:
    named = metrics or (("served", *_TIMES) if tool in LOADS else ("correct",))
    guardrails: list[dict[str, Any]] = []
    for source in sources:
        kind, _, name = source.partition(":")
        for metric in named:
            in_time = "." in metric
            test = "ratio_ni" if in_time else "paired_ni"
            loss = margin or ("10%" if in_time else "2%")
            guardrails.append({kind: name, "metric": metric, "test": test, "margin": _share(loss)})
    name = f"compare-{run.name}".lower().replace("_", "-").replace("+", "-").replace("/", "-")
    given = {
        "apiVersion": "headgate/v1",
        "kind": "Hypothesis",
        "metadata": {"name": name[:64].rstrip("-.")},
        "baseline": {"config": str(paths[0])},
        "candidate": {"config": str(paths[1])},
        "kind_of_change": "lossy_model",
        "guardrails": guardrails,
        "design": {"aa_control": False, "sabotage_control": False},
        "stats": {"alpha": alpha},
    }
    try:
        return Hypothesis.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        said = str(first["msg"]).removeprefix("Value error, ")
        raise _Misasked(f"--{first['loc'][-1]}: {said}") from None


def _share(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _rows(asked: Hypothesis, runs: Sequence[Run], tool: str) -> Rows:
    """All that is judged. A load that ran for a set time has as many requests as it got answered:
    there only places that both runs have are pairs.
    """
    observations, left_out = [one for run in runs for one in run.observations], 0
    if tool in LOADS:
        observations, left_out = _common(observations)
    versions = {"headgate": metadata.version("headgate")} | dict(runs[0].versions)
    return Rows(
        hypothesis=asked,
        observations=tuple(observations),
        sides=(_side(runs[0], tool), _side(runs[1], tool)),
        spec=Side.of({"hypothesis": asked.model_dump(mode="json")}),
        now=time.time(),
        facts=Facts(design={"imported_from": tool, "left_out": left_out}, versions=versions),
    )


def _side(run: Run, tool: str) -> Side:
    return Side.of({"imported": {"from": tool, "files": run.digest}})


def _common(observations: Sequence[Observation]) -> tuple[list[Observation], int]:
    names: dict[str, set[tuple[str, str]]] = {BASELINE: set(), CANDIDATE: set()}
    for one in observations:
        names[one.arm].add((one.source, one.id))
    both = names[BASELINE] & names[CANDIDATE]
    kept = [one for one in observations if (one.source, one.id) in both]
    return kept, len(observations) - len(kept)
