"""`headgate replicas`: which there are, and taking one out of traffic by hand and back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import click

from command.answers import AnswerError
from command.asking import ADMIN, CLIENT, Refused, asked, complain
from command.chat import base_url
from command.screen import columns, plain

HEARD_S = 1.0  # until other gateways have heard of a change, and this one of what they have
POLL_S = 0.5

Told = Mapping[str, Any]


@click.group(short_help="Take a replica out of traffic by hand, and back.")
def replicas() -> None:
    """List a gateway's replicas, drain one of them, let it take requests again.

    A drained replica takes nothing new, at no process of this gateway and at no gateway that shares
    a store with it; what runs there goes on to its end. That lasts until it is resumed, as long as
    one gateway process or the store remembers it: a single process without a store forgets it when
    it is started again. `drain: true` in the policy is for what is to last.
    HEADGATE_ADMIN_KEY is sent along where the gateway has an admin's key, HEADGATE_API_KEY where
    that is not set.

    \b
    Examples:
      headgate replicas list
      headgate replicas drain http://10.0.0.7:8000 --why "new driver" --wait 120
      headgate replicas resume http://10.0.0.7:8000

    \b
    Exit codes:
      0  done
      1  nothing answers at the URL, or requests are still under way after --wait
      2  wrong usage, no such replica, or not for you
    """


_URL = click.option(
    "--url", help="Base URL. Default: http://127.0.0.1:8080, with HEADGATE_PORT's port."
)


@replicas.command("list", short_help="Which there are, and what each does.")
@_URL
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def listing(url: str | None, as_json: bool) -> None:
    """List the replicas, drained ones with their reason."""
    raise SystemExit(_tell(url, "", None, as_json=as_json))


@replicas.command(short_help="It takes nothing new; what runs there ends.")
@click.argument("replica")
@_URL
@click.option("--why", default="", help="The reason, for who looks.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    help="Seconds to wait until nothing is under way there at any gateway; 1 if it still is.",
)
def drain(replica: str, url: str | None, why: str, wait: float | None) -> None:
    """Drain the replica at the URL REPLICA."""
    if wait is not None and not math.isfinite(wait):
        raise click.BadParameter("expected seconds, such as 120", param_hint="--wait")
    code = _tell(url, "/drain", {"url": replica, "why": why})
    if code == 0 and wait is not None:
        code = _wait(url, replica, wait)
    raise SystemExit(code)


@replicas.command(short_help="It takes requests again.")
@click.argument("replica")
@_URL
def resume(replica: str, url: str | None) -> None:
    """Let the replica at the URL REPLICA take requests again.

    One that the policy or its discovery has drained, too, stays so.
    """
    raise SystemExit(_tell(url, "/resume", {"url": replica}))


def _tell(url: str | None, path: str, body: Told | None, *, as_json: bool = False) -> int:
    try:
        told = ask(url, path, body)
    except (Refused, AnswerError) as error:
        return complain(error)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return 0
    found = told["replicas"]
    click.echo("\n".join(map(plain, columns([_row(one) for one in found]))))
    asked, of = told["processes"]["asked"], told["processes"]["of"]
    if asked < of:
        click.echo(f"under way at {asked} of {of} gateway processes; others are silent", err=True)
    if body is not None and not any(one["healthy"] and not one["draining"] for one in found):
        click.echo("no replica is left that takes requests", err=True)
    return 0


def _row(one: Told) -> tuple[str, str, str]:
    drained = one["drained"] or {}
    state = "drained" if drained else "draining" if one["draining"] else "ready"
    if not one["healthy"]:
        state = "down" if state == "ready" else f"down, {state}"
    why = "  " + drained["why"] if drained.get("why") else ""
    return str(one["url"]), state, f"{one['in_flight']} under way{why}"


def _wait(url: str | None, replica: str, wait_s: float) -> int:
    """Until two looks in a row, after all have heard of it, found nothing under way."""
    ends_at = time.monotonic() + wait_s
    time.sleep(HEARD_S)
    idle = 0
    while True:
        try:
            told = ask(url, "", None)
        except (Refused, AnswerError) as error:
            click.echo(plain(str(error)), err=True)
            return 1
        name = replica.rstrip("/").removesuffix("/v1")
        still = sum(one["in_flight"] for one in told["replicas"] if one["url"] == name)
        idle = 0 if still else idle + 1
        if idle == 2:
            click.echo("nothing is under way there any more")
            return 0
        if still and time.monotonic() > ends_at:
            click.echo(f"still under way there: {still}", err=True)
            return 1
        time.sleep(POLL_S)


def ask(url: str | None, path: str, body: Told | None) -> dict[str, Any]:
    """What the gateway tells. Raises Refused, and AnswerError for what no gateway of ours would
    answer."""
    where = f"{base_url(url)}/admin/replicas{path}"
    try:
        told = json.loads(asked(where, ADMIN, CLIENT, body=body))
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("replicas"), list):
        raise AnswerError(
            f"{where} did not answer with replicas: no gateway of Headgate, or one of another "
            "version, is there; give its address with --url"
        )
    return told
