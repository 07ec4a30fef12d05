"""`headgate trace`: one request's spans as bars in time, in a terminal."""

from __future__ import annotations

import json
import os
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from command.answers import KEY_VARIABLE, AnswerError, WrongUsage
from command.asking import Refused, asked
from command.chat import base_url
from command.replicas import ADMIN_VARIABLE
from command.screen import columns, plain

PARTS = " ▏▎▍▌▋▊▉█"  # eighths of a cell
TEXT_MAX = 46  # columns for names
BAR_MIN = 16
MARK = "·"  # an event inside a span
LISTED = 20
PHASE = "headgate.phase."
FAR = 1e15  # seconds; no clock tells more
# What is drawn of a request, of its spans and of their events; anything may answer at a URL.
_NUMBER = (int, float)
_Types = Mapping[str, type | tuple[type, ...]]
_REQUEST: _Types = {
    "request_id": str, "tier": str, "model": str, "status": int, "error": str, "arm": str,
    "keep": str, "e2e_s": _NUMBER, "ttft_s": (int, float, type(None)),
}  # fmt: skip
_SPAN: _Types = {
    "span_id": str, "parent_id": str, "name": str, "status": str, "events": list,
    "attributes": dict, "start_s": _NUMBER, "end_s": _NUMBER,
}  # fmt: skip


def trace(name: str, url: str | None, *, as_json: bool) -> int:
    """The exit code. `latest` and `slow` list what is kept."""
    listing = name in ("latest", "slow")
    try:
        told = read(name, url)
    except (Refused, AnswerError) as error:
        click.echo(plain(str(error)), err=True)
        return 2 if isinstance(error, Refused | WrongUsage) else 1
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        width = shutil.get_terminal_size((100, 40)).columns
        lines = rows(told["traces"]) if listing else drawn(told, width)
        click.echo("\n".join(map(plain, lines)))
    if listing and (missing := unasked(told)):
        click.echo(missing, err=True)
    return 0


def unasked(told: Mapping[str, Any]) -> str:
    """Which processes a list is of, where it is not of all."""
    processes = told.get("processes") or {"asked": 1, "of": 1}
    asked, of = processes["asked"], processes["of"]
    if asked >= of:
        return ""
    return f"of {asked} of {of} gateway processes; --url asks another at its own address"


def read(name: str, url: str | None) -> dict[str, Any]:
    """What the gateway tells. Raises Refused, and AnswerError for what no gateway of ours would
    answer."""
    if listing := name in ("latest", "slow"):
        path = f"?limit={LISTED}" + ("&slow=1" if name == "slow" else "")
    else:
        path = "/" + urllib.parse.quote(name, safe="")
    where = f"{base_url(url)}/admin/traces{path}"
    # A gateway without an operator's key may still have tenants, or a key of either name be set.
    operator = os.environ.get(ADMIN_VARIABLE, "").strip() or not os.environ.get(KEY_VARIABLE)
    try:
        text = asked(where, ADMIN_VARIABLE if operator else KEY_VARIABLE)
        told = json.loads(text, parse_float=_real, parse_constant=_real, parse_int=_whole)
    except (ValueError, RecursionError):
        told = None
    if not (is_list(told) if listing else is_trace(told)):
        raise AnswerError(
            f"{where} did not answer with traces: no gateway of Headgate, or one of another "
            "version, is there; give its address with --url"
        )
    return dict(told)


def is_list(told: object) -> bool:
    """Whether it is what `/admin/traces` tells, as far as it is shown."""
    return (
        isinstance(told, dict)
        and isinstance(told.get("traces"), list)
        and all(_has(one, _REQUEST) for one in told["traces"])
        and ("processes" not in told or _has(told["processes"], {"asked": int, "of": int}))
    )


def is_trace(told: object) -> bool:
    """Whether it is one trace with its spans, of which each has an id and one has no parent."""
    if not (_has(told, {**_REQUEST, "trace_id": str, "spans": list}) and isinstance(told, dict)):
        return False
    spans = told["spans"]
    if not all(_has(one, _SPAN) and _numbers(one) for one in spans):
        return False
    ids = {one["span_id"] for one in spans}
    return all(one["span_id"] for one in spans) and any(
        one["parent_id"] not in ids for one in spans
    )


def _numbers(span: Mapping[str, Any]) -> bool:
    """Whether its events have a time and its phases seconds."""
    return all(_has(event, {"at_s": _NUMBER}) for event in span["events"]) and all(
        isinstance(value, _NUMBER)
        for name, value in span["attributes"].items()
        if name.startswith(PHASE)
    )


def _real(text: str) -> float:
    """A number that can be drawn. Raises ValueError."""
    if not abs(value := float(text)) < FAR:
        raise ValueError(f"{text} is no time")
    return value


def _whole(text: str) -> int:
    return int(text) if _real(text) else 0


def _has(told: Any, fields: _Types) -> bool:
    """An object with these fields, each of its type."""
    return isinstance(told, dict) and all(
        isinstance(told.get(name, ...), kind) for name, kind in fields.items()
    )


def rows(traces: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a request."""
    table = [("request", "tier", "model", "status", "first token", "whole", "")]
    for one in traces:
        first = "" if one["ttft_s"] is None else ms(one["ttft_s"])
        status = _status(one)
        about = " ".join(filter(None, (one["arm"], one["keep"])))
        names = (cut(one["request_id"]), cut(one["tier"]), cut(one["model"]), cut(status))
        table.append((*names, first, ms(one["e2e_s"]), about))
    return columns(table)


def _status(told: Mapping[str, Any]) -> str:
    """With what went wrong, where that has a name of its own."""
    status, error = str(told["status"]), told["error"]
    return status if error in ("", status) else f"{status} {error}"


def cut(name: str) -> str:
    """Names may be as long as whoever asked made them."""
    return name if len(name) <= TEXT_MAX else name[: TEXT_MAX - 1] + "…"


def drawn(told: Mapping[str, Any], width: int) -> list[str]:
    """The request in a line, its spans as a tree with bars, and where the time went."""
    spans = told["spans"]
    began = min(span["start_s"] for span in spans)
    whole_s = max(span["end_s"] for span in spans) - began
    tree = list(in_order(spans))
    names = [f"{'  ' * depth}{span['name']}"[:TEXT_MAX] for depth, span in tree]
    text = max(map(len, names))
    bar = max(BAR_MIN, width - text - 13)
    status = _status(told)
    lines = [
        f"{told['request_id']}  {told['tier']}  {told['model']}  {status}  {ms(told['e2e_s'])}",
        f"trace {told['trace_id']}",
        "",
    ]
    for text_of, (_, span) in zip(names, tree, strict=True):
        drawing = bar_of(span, began, whole_s, bar)
        failed = " !" if span["status"] == "ERROR" else ""
        took = ms(span["end_s"] - span["start_s"])
        lines.append(f"{text_of.ljust(text)} {drawing} {took:>10}{failed}".rstrip())
    lines += ["", *phases(tree[0][1]["attributes"])]
    return lines


def in_order(spans: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each span below its parent, by their beginnings, with how deep it stands."""
    known = {span["span_id"] for span in spans}
    below: dict[str, list[Mapping[str, Any]]] = {}
    for span in sorted(spans, key=lambda one: one["start_s"]):
        parent = span["parent_id"] if span["parent_id"] in known else ""
        below.setdefault(parent, []).append(span)

    waiting = [(0, span) for span in reversed(below.pop("", ()))]
    while waiting:
        depth, span = waiting.pop()
        yield depth, span
        waiting += [(depth + 1, one) for one in reversed(below.pop(span["span_id"], ()))]


def bar_of(span: Mapping[str, Any], began: float, whole_s: float, cells: int) -> str:
    """Where in the whole a span lies, to an eighth of a cell; at least a mark of it shows."""
    scale = 8 * cells / whole_s if whole_s > 1e-9 else 0.0  # below, clocks tell nothing
    start = min(round((span["start_s"] - began) * scale), 8 * cells - 1)
    end = min(max(round((span["end_s"] - began) * scale), start + 1), 8 * cells)
    first, last = start // 8, (end - 1) // 8
    bar = [" "] * first + ["█"] * (last - first + 1)
    bar[last] = PARTS[end - 8 * last]
    if first < last and start % 8:
        bar[first] = "▐" if start % 8 >= 4 else "█"
    for event in span["events"]:
        at = int((event["at_s"] - began) * scale) // 8
        if first < at < last:
            bar[at] = MARK
    return "".join(bar).ljust(cells)


def phases(attributes: Mapping[str, Any]) -> list[str]:
    """The phases that took any time, with their share of the whole."""
    found = {
        name.removeprefix(PHASE).removesuffix("_s"): float(value)
        for name, value in attributes.items()
        if name.startswith(PHASE)
    }
    whole_s = sum(found.values()) or 1.0
    return columns(
        (name, ms(value).rjust(10), f"{value / whole_s:5.0%}")
        for name, value in found.items()
        if value >= 5e-7
    )


def ms(seconds: float) -> str:
    """As people read it."""
    return f"{1000 * seconds:,.2f} ms" if seconds < 10 else f"{seconds:,.1f} s"
