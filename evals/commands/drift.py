"""`headgate gate drift`: whether a verdict is still about the traffic that there is."""

from __future__ import annotations

import time
from pathlib import Path

import click

from evals.verdict import EXIT_CODES, USAGE_EXIT

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("hypothesis", type=_FILE)
@click.argument("traffic", type=_FILE)
def drift(hypothesis: Path, traffic: Path) -> None:
    """Compare recorded TRAFFIC with the replays that HYPOTHESIS was judged on, and note it.

    TRAFFIC is what the gateway's recorder writes, or any file that `headgate replay` plays. Where
    the mix has moved (a population stability index above 0.2) the ledger says so, and the verdict
    is stale, or told, as `validity.on_traffic_drift` has it; where it is back, that is noted too.

    \b
    Example:
      headgate gate drift hypotheses/w8a8.yaml .headgate/records

    \b
    Exit codes:
      0  it looks the same
      2  wrong usage, too few requests, or the hypothesis names no replay
      6  it has moved
    """
    from evals.moved import compare
    from evals.rows import TraceError
    from evals.traces import read_trace
    from policies.binding import ledger_of
    from policies.evidence import NoEvidence, find_source
    from policies.ledger import ON_DRIFT, Decision, LedgerError
    from policies.load import PolicyError, load_hypothesis

    try:
        asked = load_hypothesis(hypothesis)
        named = [source for source in asked.sources if source.startswith("replay:")]
        if not named:
            raise ValueError(f"{hypothesis} names no replay to compare with")
        live = read_trace(traffic).rows
        judged = [row for name in named for row in read_trace(find_source(name, hypothesis)).rows]
        found = compare(judged, live)
        what, index = found.furthest
        for name, one in found.psi.items():
            click.echo(f"{name:<14} {one:.3f}")
        state = "same" if found.stays else "moved"
        reason = f"{what} of live traffic has moved (PSI {index:.2f})"
        said = "" if found.stays else reason
        detail = {**found.psi, ON_DRIFT: asked.validity.on_traffic_drift}
        ledger_of(hypothesis, asked).record(
            Decision("drift", asked.name, "", "", "", time.time(), state, said, detail=detail)
        )
    except (PolicyError, TraceError, NoEvidence, LedgerError, ValueError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(USAGE_EXIT) from None
    click.echo("it looks the same" if found.stays else reason)
    raise SystemExit(0 if found.stays else EXIT_CODES["stale"])
