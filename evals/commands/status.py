"""`headgate gate status`: which optimizations of a policy are on, and why the others are not."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evals.verdict import EXIT_CODES, USAGE_EXIT

if TYPE_CHECKING:
    from policies.enabling import Gated
    from policies.ledger import Decision

NO_VERDICT = EXIT_CODES["inconclusive"]


@click.command()
@click.argument("policy", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def status(policy: Path | None, as_json: bool) -> None:
    """Say which optimizations of POLICY would be served now, which not, and what made them stale.

    It is what `headgate serve` says at its start, by the same rules; nothing is started. Verdicts
    of hypotheses that the policy does not name are listed below.

    \b
    Examples:
      headgate gate status my-policy.yaml
      headgate gate status my-policy.yaml --json

    \b
    Exit codes:
      0  every optimization has a live pass
      1  one failed, or is quarantined
      2  the policy or a hypothesis is wrong
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
    others = _others(found)
    if as_json:
        click.echo(json.dumps(_payload(found, others, now), indent=2))
    else:
        for line in _lines(found, others, now):
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


def _others(found: Gated) -> list[Decision]:
    """The last verdict of each hypothesis that the policy does not name, in its ledgers."""
    from policies.chain import ledgers
    from policies.ledger import LedgerError

    verdicts: list[Decision] = []
    for ledger in ledgers(found):
        with contextlib.suppress(LedgerError):  # told with each optimization
            verdicts += ledger.verdicts()
    named = {one.hypothesis for one in found.standings}
    last = {one.hypothesis: one for one in sorted(verdicts, key=lambda one: one.at)}
    return [one for name, one in sorted(last.items()) if name not in named]


def _payload(found: Gated, others: list[Decision], now: float) -> dict[str, Any]:
    return {
        "policy": str(found.file),
        "enforce": found.deployment.gate.enforce,
        "optimizations": [_aged(one, now) for one in found.payload()],
        "not_in_the_policy": [
            _aged(
                {
                    "hypothesis": one.hypothesis,
                    "verdict": one.decision,
                    "reason": one.reason or None,
                    "made_at": one.at,
                    "expires_at": one.expires_at,
                    "evidence": one.evidence,
                },
                now,
            )
            for one in others
        ],
        "ungated": list(found.ungated),
        "damaged_lines": list(found.damaged),
    }


def _aged(told: dict[str, Any], now: float) -> dict[str, Any]:
    made_at = told["made_at"]
    return told | {"age_s": None if made_at is None else round(now - made_at, 1)}


def _lines(found: Gated, others: list[Decision], now: float) -> list[str]:
    from policies.enabling import rows

    table = [list(row) for row in rows(found)]
    for one in others:
        age = f"{_age(now - one.at)} old, not in the policy"
        table.append([f"hypothesis {one.hypothesis}", one.decision, age])
    if not table:
        return [f"{found.file} has no optimizations"]
    first, second = (max(len(row[at]) for row in table) for at in (0, 1))
    return [f"{a.ljust(first)}  {b.ljust(second)}  {why}".rstrip() for a, b, why in table]


def _age(age_s: float) -> str:
    days, hours = age_s / 86400, age_s / 3600
    return f"{days:.0f} days" if days >= 2 else f"{hours:.0f} hours"
