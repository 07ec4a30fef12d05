"""`headgate replay`: recorded traffic, played to a server, and what came of it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import uvloop

from evals.client import Client
from evals.filler import Filler, measured
from evals.item import Item
from evals.replay import LATE_S, Lateness, Replay
from evals.rows import FORMATS, TraceError
from evals.summary import summarize
from evals.traces import Trace, read_trace
from policies.fields import base_url
from policies.load import PolicyError, port_of
from telemetry import Observation

KEY_VARIABLE = "HEADGATE_API_KEY"
DEFAULT_PORT = 8080
AS_FAST = "max"


@dataclass(frozen=True, slots=True)
class Options:
    """What was typed beside the file."""

    url: str
    model: str | None
    speed: float | None
    at_once: int | None
    token_share: float
    timeout_s: float
    arm: str
    salt: str | None


def _speed(_context: click.Context, _option: click.Parameter, value: str) -> float | None:
    if value == AS_FAST:
        return None
    try:
        speed = float(value)
    except ValueError:
        speed = -1.0
    if not 0 < speed < float("inf"):
        raise click.BadParameter(f"expected a factor such as 1 or 2.5, or {AS_FAST}, got {value!r}")
    return speed


@click.command(short_help="Play recorded traffic to a server, and say what came of it.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--url", help="Base URL. Default: http://127.0.0.1:8080, with HEADGATE_PORT's port.")
@click.option("--model", help="Ask for this model, whatever was recorded.")
@click.option("--speed", callback=_speed, default="1", help="A factor, or `max`. Default: 1.")
@click.option("--at-once", type=click.IntRange(1), help="At most so many requests under way.")
@click.option("--begin", type=click.FloatRange(0), default=0.0, help="Skip so many seconds.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Play so many seconds.")
@click.option("--requests", type=click.IntRange(1), help="Play so many requests.")
@click.option("--format", "kind", type=click.Choice(list(FORMATS)), help="Default: it is seen.")
@click.option(
    "--token-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Scale made-up prompts and answers, of traces that have lengths only.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    help="Give a request up after so many seconds. Default: 300.",
)
@click.option("--arm", default="replay", help="What the observations are named by.")
@click.option("--salt", help="Sent as `cache_salt`: what another salt cached is not found.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Write one observation a line, as JSON.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def replay(
    file: Path, begin: float, seconds: float | None, requests: int | None, kind: str | None,
    out: Path | None, as_json: bool, url: str | None, **given: Any,
) -> None:  # fmt: skip
    """Send the requests of FILE when they were recorded, without waiting for answers.

    FILE is what the gateway's recorder wrote, a trace of Mooncake, Azure, BurstGPT or ServeGen, or
    JSONL with `t_ms` and `body`; .gz and .zst are unpacked. For traces that have lengths only, text
    is made up: the same blocks become the same words. HEADGATE_API_KEY is sent along.

    \b
    Examples:
      headgate replay .headgate/recorded/
      headgate replay traffic.jsonl.gz --speed 4 --seconds 60
      headgate replay mooncake.jsonl.gz --token-share 0.05 --requests 200

    \b
    Exit codes:
      0  played, and answered
      1  a request failed, or none was answered; those that were refused under load are counted
      2  wrong usage, or FILE is no trace
      4  too many requests were sent too late: the numbers are this program's, not the server's
    """
    try:
        port = port_of()
        trace = read_trace(file, kind)
    except (TraceError, PolicyError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(2) from None
    trace = trace.window(begin, None if seconds is None else begin + seconds, requests)
    if not trace.rows:
        click.echo(f"{file}: no request came then", err=True)
        raise SystemExit(2)
    try:
        base = base_url(url or f"http://127.0.0.1:{port or DEFAULT_PORT}")
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--url'") from None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        told = runner.run(_play(trace, Options(url=base, **given), out))
    click.echo(json.dumps(told) if as_json else "\n".join(_table(told)))
    raise SystemExit(_exit_code(told))


async def _play(trace: Trace, options: Options, out: Path | None) -> dict[str, Any]:
    key = os.environ.get(KEY_VARIABLE)
    async with Client(options.url, key, timeout_s=options.timeout_s) as client:
        model = await _model(client, trace, options)
        filler = Filler(token_share=options.token_share)
        if trace.needs_filler:
            filler = await measured(client, model or "", options.token_share) or filler
        began = time.monotonic()

        def now() -> float:
            return time.monotonic() - began

        async def ask(item: Item) -> Observation:
            source = f"replay:{trace.name}"
            return await client.ask(item, options.arm, source, now=now, salt=options.salt)

        play = Replay(ask, speed=options.speed, at_once=options.at_once, clock=now)
        seen: list[Observation] = []
        with click.open_file(str(out), "w", encoding="utf-8") if out else _Nowhere() as stream:
            async for one in play.observations(trace.items(filler, model)):
                seen.append(one)
                stream.write(json.dumps(one.payload(), ensure_ascii=False) + "\n")
        return _told(trace, options, model, seen, now(), play.lateness)


class _Nowhere:
    """A file that keeps nothing."""

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def write(self, text: str) -> None: ...


async def _model(client: Client, trace: Trace, options: Options) -> str | None:
    """The model to ask for instead of the recorded one; None: as recorded, which is offered."""
    if options.model is not None:
        return options.model
    offered = await client.models()
    asked = {(row.body or {}).get("model") for row in trace.rows}
    if not offered or asked <= set(offered):
        return None
    return offered[0]


def _told(
    trace: Trace, options: Options, model: str | None, seen: Sequence[Observation],
    took_s: float, lateness: Lateness,
) -> dict[str, Any]:  # fmt: skip
    return {
        "trace": trace.name,
        "format": trace.format,
        "sha256": trace.digest,
        "recorded_s": trace.spans_s,
        "url": options.url,
        "model": model,
        "speed": options.speed,
        **summarize(seen, took_s),
        "late": {
            "p50_s": lateness.quantile(0.5),
            "p99_s": lateness.quantile(0.99),
            "share": lateness.late_share,
            "generator_saturated": lateness.saturated,
        },
    }


def _exit_code(told: dict[str, Any]) -> int:
    ended = told["outcomes"]
    if not ended.get("ok") or ended.get("error") or ended.get("timeout"):
        return 1
    return 4 if told["late"]["generator_saturated"] else 0


# ---- as a table ---------------------------------------------------------------------------------


def _table(told: dict[str, Any]) -> list[str]:
    pace = f"{told['speed']:g} x" if told["speed"] else "as fast as possible"
    lines = [
        f"{told['trace']} ({told['format']}), recorded over {told['recorded_s']:.1f} s, "
        f"played {pace} in {told['took_s']:.1f} s",
        f"to {told['url']}, model {told['model'] or 'as recorded'}",
        "",
        "  ".join(f"{name} {count}" for name, count in told["outcomes"].items()),
        f"{_number(told['requests_per_s'])} answers/s, {_number(told['tokens_per_s'])} tokens/s, "
        f"{told['cached_tokens']} of {told['prompt_tokens']} prompt tokens cached",
        "",
        " " * 14 + "".join(f"{name:>12}" for name in ("p50", "p95", "p99", "max")),
    ]
    for name, of in told["times"].items():
        lines.append(f"{_NAMES[name]:<14}" + "".join(f"{_ms(value):>12}" for value in of.values()))
    late = told["late"]
    lines += ["", f"sent late: p50 {_ms(late['p50_s'])}, p99 {_ms(late['p99_s'])}"]
    if late["generator_saturated"]:
        lines.append(
            f"generator saturated: {late['share']:.1%} were sent more than {LATE_S:g} s late; "
            "these times are not the server's. Play slower, or fewer at once."
        )
    lines += [f"{count} x {problem}" for problem, count in told["problems"]]
    return lines


_NAMES = {"ttft_s": "first token", "tpot_s": "each further", "gap_max_s": "longest gap",
          "e2e_s": "whole"}  # fmt: skip


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
