"""`headgate requests`: those that a gateway keeps, sifted by what one looks for, a line each."""

from __future__ import annotations

import json
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import click

from command.answers import AnswerError
from command.asking import ADMIN, CLIENT, Refused, asked, complain, has, numbered
from command.chat import base_url
from command.screen import columns, cut, ms, plain

USUAL, MOST = 20, 200
OUTCOMES = ("ok", "missed", "late", "failed", "shed", "limited", "refused", "cancelled")
MAYBE_NUMBER = (int, float, type(None))
_REQUEST: Mapping[str, type | tuple[type, ...]] = {
    "id": str, "at": (int, float), "tenant": str, "model": str, "tier": str, "arm": str,
    "status": int, "error": str, "outcome": str, "attempts": int, "e2e_s": (int, float),
    "ttft_s": MAYBE_NUMBER, "prompt_tokens": MAYBE_NUMBER, "cached_tokens": MAYBE_NUMBER,
    "answer_tokens": MAYBE_NUMBER,
}  # fmt: skip

Told = Mapping[str, Any]


@click.command(short_help="Requests that a gateway keeps, sifted, a line each.")
@click.option("--outcome", type=click.Choice(OUTCOMES), help="How they ended.")
@click.option("--tier", help="Of this tier alone.")
@click.option("--tenant", help="Of this tenant.")
@click.option("--model", help="For this model.")
@click.option("--replica", help="That this replica answered last, by its URL.")
@click.option("--arm", help="Of a rollout's arm: baseline or candidate.")
@click.option("--text", help="Part of an id, a name or an error.")
@click.option("--first-token-over", type=float, metavar="S", help="Whose first token took longer.")
@click.option("--took-over", type=float, metavar="S", help="That took longer in all.")
@click.option("--slowest", is_flag=True, help="The slowest first, not the latest.")
@click.option("--limit", type=click.IntRange(1, MOST), default=USUAL, show_default=True)
@click.option("--url", help="Base URL. Default: http://127.0.0.1:8080, with HEADGATE_PORT's port.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def requests(
    first_token_over: float | None,
    took_over: float | None,
    slowest: bool,
    limit: int,
    url: str | None,
    as_json: bool,
    **fields: str | None,
) -> None:
    """List the latest requests that a gateway keeps, or those that are looked for: `tracing.keep`
    of each process, and older ones that failed, were late or a candidate's.

    HEADGATE_ADMIN_KEY is sent along where the gateway has an admin's key, HEADGATE_API_KEY where
    that is not set.

    \b
    Examples:
      headgate requests --outcome failed
      headgate requests --tier interactive --first-token-over 0.5 --slowest

    \b
    Exit codes:
      0  listed, perhaps none
      1  nothing answers at the URL, or no gateway
      2  wrong usage, or not for you
    """
    if first_token_over is not None and took_over is not None:
        raise click.UsageError("--first-token-over and --took-over are of two clocks; give one")
    sieve = {name: value for name, value in fields.items() if value}
    over_s = first_token_over if took_over is None else took_over
    if over_s is not None:
        sieve["over_s"] = str(over_s)
    whole = took_over is not None or (slowest and first_token_over is None)
    sieve |= {"clock": "whole"} if whole else {}
    sieve |= {"order": "slowest"} if slowest else {}
    raise SystemExit(listed(url, sieve | {"limit": str(limit)}, as_json=as_json))


def listed(url: str | None, sieve: Mapping[str, str], *, as_json: bool) -> int:
    """The exit code."""
    try:
        told = read(url, sieve)
    except (Refused, AnswerError) as error:
        return complain(error)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return 0
    click.echo("\n".join(map(plain, rows(told["requests"], time.time()))))
    if told["matched"] > len(told["requests"]):
        click.echo(
            f"{len(told['requests'])} of {told['matched']} that fit; --limit shows more", err=True
        )
    asked_of, of = told["processes"]["asked"], told["processes"]["of"]
    if asked_of < of:
        click.echo(
            f"of {asked_of} of {of} gateway processes; --url asks another at its own address",
            err=True,
        )
    return 0


def read(url: str | None, sieve: Mapping[str, str]) -> dict[str, Any]:
    """What the gateway tells. Raises Refused, and AnswerError for what no gateway of ours would
    answer."""
    where = f"{base_url(url)}/admin/requests?{urllib.parse.urlencode(sieve)}"
    told = numbered(asked(where, ADMIN, CLIENT))
    known = (
        has(told, {"requests": list, "processes": dict, "matched": int})
        and all(has(one, _REQUEST) for one in told["requests"])
        and has(told["processes"], {"asked": int, "of": int})
    )
    if not known:
        raise AnswerError(
            f"{where} did not answer with requests: no gateway of Headgate, or one of another "
            "version, is there; give its address with --url"
        )
    return dict(told)


def rows(requests: Sequence[Told], now: float) -> list[str]:
    """One line a request; who asked stands there where anybody has a name."""
    named = any(one["tenant"] for one in requests)
    head = ("came", "request", *(["tenant"] if named else []), "tier", "model")
    table = [(*head, "tokens", "cached", "first token", "whole", "ended")]
    for one in requests:
        names = [one["id"], *([one["tenant"]] if named else []), one["tier"], one["model"]]
        tokens = (one["prompt_tokens"], one["answer_tokens"])
        cached, first_s = one["cached_tokens"], one["ttft_s"]
        table.append(
            (
                came(one["at"], now),
                *map(cut, names),
                "" if None in tokens else "{:,.0f} + {:,.0f}".format(*tokens),
                f"{cached / tokens[0]:.0%}" if cached is not None and tokens[0] else "",
                "" if first_s is None else ms(first_s),
                ms(one["e2e_s"]),
                ended(one),
            )
        )
    return columns(table)


def came(at: float, now: float) -> str:
    """The time of day, here; of another day with its date."""
    then = time.localtime(at)
    today = then[:3] == time.localtime(now)[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)


def ended(one: Told) -> str:
    """In a word, and what is to be said of it."""
    why = [status_of(one)] if one["outcome"] != "ok" else []
    tries = [f"{one['attempts']} tries"] if one["attempts"] > 1 else []
    arm = [one["arm"]] if one["arm"] not in ("", "baseline") else []
    return ", ".join((" ".join((one["outcome"], *map(cut, why))), *tries, *map(cut, arm)))


def status_of(told: Told) -> str:
    """With what went wrong, where that has a name of its own."""
    status, error = str(told["status"]), told["error"]
    return status if error in ("", status) else f"{status} {error}"
