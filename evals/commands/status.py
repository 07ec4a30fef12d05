"""`headgate gate status`: which optimizations of a policy are on, and why the others are not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evals.verdict import EXIT_CODES, USAGE_EXIT

if TYPE_CHECKING:
    from policies.enabling import Gated
    from policies.standing import Standing

KIND = "Hypothesis"
NO_VERDICT = EXIT_CODES["inconclusive"]


@click.command()
@click.argument("policy", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def status(policy: Path | None, as_json: bool) -> None:
    """Say which optimizations of POLICY would be served now, which not, and what made them stale.

    It is what `headgate serve` says at its start, by the same rules; nothing is started. Hypotheses
    beside the policy that it does not name, and those in `hypotheses/` there, are judged by their
    own baselines: `ready` ones could be named.

    \b
    Examples:
      headgate gate status my-policy.yaml
      headgate gate status my-policy.yaml --json

    \b
    Exit codes, by what the policy names:
      0  every optimization has a live pass
      1  one failed, or is quarantined
      2  the policy or a hypothesis that it names is wrong
      3  one has no verdict, or an inconclusive one
      4  the verdict of one is invalid
      5  one brought no benefit
      6  one is stale: what it was judged on has changed, or time has passed
    """
    import policies
    from policies.enabling import gated
    from policies.load import PolicyError, load

    file = policy or Path(policies.__file__).parent / "local.yaml"
    now = time.time()
    try:
        found = gated(file, load(file), now)
    except PolicyError as error:
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    unnamed = list(_unnamed(found, now))
    if as_json:
        click.echo(json.dumps(_payload(found, unnamed, now), indent=2))
    else:
        for line in _lines(found, unnamed):
            click.echo(line)
    raise SystemExit(exit_code(found))


def exit_code(found: Gated) -> int:
    """Of the first optimization that has no live pass."""
    for one in found.standings:
        if one.state == "stale":
            return EXIT_CODES["stale"]
        if one.state == "quarantined":
            return EXIT_CODES["fail"]
        if one.state == "off":
            return EXIT_CODES.get(one.verdict, NO_VERDICT)
    return 0


def _unnamed(found: Gated, now: float) -> Iterator[tuple[Path, Standing | str]]:
    """Hypotheses of which the policy says nothing, as they stand, or what is wrong with them."""
    from policies.binding import standing_of
    from policies.load import PolicyError, load_hypothesis, read_yaml

    named = {one.file for one in found.standings}
    folder = found.file.parent
    for file in (*sorted(folder.glob("*.yaml")), *sorted(folder.glob("hypotheses/*.yaml"))):
        try:
            data, _, _ = read_yaml(str(file))
            if str(file) in named or not isinstance(data, dict) or data.get("kind") != KIND:
                continue
            yield file, standing_of(file, load_hypothesis(file), now)
        except PolicyError as error:
            yield file, str(error).partition("\n")[0]


def _payload(
    found: Gated, unnamed: list[tuple[Path, Standing | str]], now: float
) -> dict[str, Any]:
    others = [
        {"file": str(file), "problem": one} if isinstance(one, str) else _aged(one.payload(), now)
        for file, one in unnamed
    ]
    return {
        "policy": str(found.file),
        "enforce": found.deployment.gate.enforce,
        "optimizations": [_aged(one, now) for one in found.payload()],
        "not_in_the_policy": others,
        "ungated": list(found.ungated),
        "damaged_lines": list(found.damaged),
    }


def _aged(told: dict[str, Any], now: float) -> dict[str, Any]:
    made_at = told["made_at"]
    return told | {"age_s": None if made_at is None else round(now - made_at, 1)}


def _lines(found: Gated, unnamed: list[tuple[Path, Standing | str]]) -> list[str]:
    from policies.enabling import rows, said

    table = list(rows(found))
    for file, one in unnamed:
        if isinstance(one, str):
            table.append((f"hypothesis {file.stem}", "wrong", one))
            continue
        state, why = said(replace(one, enabled=one.state == "on"))
        table.append((f"hypothesis {one.hypothesis}", "ready" if state == "on" else state, why))
    head = [] if found.standings else [f"{found.file} has no optimizations"]
    first, second = (max((len(row[at]) for row in table), default=0) for at in (0, 1))
    return head + [f"{a.ljust(first)}  {b.ljust(second)}  {why}".rstrip() for a, b, why in table]
