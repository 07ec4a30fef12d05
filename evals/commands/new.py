"""`headgate gate new`: the beginning of a hypothesis, by the knob that it changes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from evals.verdict import USAGE_EXIT
from policies.hypothesis import misfit
from policies.knobs import KNOBS, knob_of
from policies.load import PolicyError, load_hypothesis
from policies.yaml_tree import parse

_BATTERY = {
    True: ("correct, test: paired_ni, margin: 2%", "lost, test: rate_max, max: 3%"),
    False: ("correct, test: paired_ni, margin: 2%", "divergence, test: identical, margin: 1%"),
}  # by whether the change is lossy


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--config", default="base.yaml", help="Policy file of the baseline, beside FILE.")
@click.option(
    "--set", "change", required=True, help="What the candidate changes: `runtime.kv=int8`."
)
@click.option("--suite", default="pocket", help="Suite that says what must not be lost.")
def new(file: Path, config: str, change: str, suite: str) -> None:
    """Write FILE, a hypothesis with the guardrails that its kind of change calls for, to be edited.

    \b
    Example:
      headgate gate new int8.yaml --config serve.yaml --set runtime.kv=int8

    \b
    Exit codes:
      0  written
      2  no such knob, or FILE is there already
    """
    knob, _, value = change.partition("=")
    named = knob_of(knob)
    if named is None or not value:
        why = misfit("lossless_exact", knob) if named is None else "expected KNOB=VALUE"
        click.echo(f"--set {change}: {why}", err=True)
        raise SystemExit(USAGE_EXIT)
    kind = KNOBS[named]
    rails = "\n".join(
        f"  - {{suite: {json.dumps(suite)}, metric: {one}}}"
        for one in (*_BATTERY[kind.startswith("lossy")], "ttft.p50, test: ratio_ni, margin: 15%")
    )
    patch = json.dumps(parse("--set", value)[0], ensure_ascii=False)
    text = f"""\
# Edit what must be gained and what must not be lost; docs/hypothesis.md describes every field.
apiVersion: headgate/v1
kind: Hypothesis
metadata: {{name: {json.dumps(file.stem.lower())}}}
baseline: {{config: {json.dumps(config)}}}
candidate: {{patch: {{{knob}: {patch}}}}}
kind_of_change: {kind}
claims:
  - {{suite: {json.dumps(suite)}, metric: tpot.p50, direction: lower, min_effect: 8%}}
guardrails:
{rails}
"""
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
        load_hypothesis(file)
    except FileExistsError:
        click.echo(f"{file}  is there already", err=True)
        raise SystemExit(USAGE_EXIT) from None
    except OSError as error:
        click.echo(f"{file}  cannot be written: {error.strerror}", err=True)
        raise SystemExit(USAGE_EXIT) from None
    except PolicyError as error:
        file.unlink()
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    click.echo(f"{file}  then: headgate gate plan {file}")
