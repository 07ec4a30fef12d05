"""`headgate trace`: one request's spans as bars in time, in a terminal."""

from __future__ import annotations

import json
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from command.answers import AnswerError
from command.asking import ADMIN, CLIENT, Refused, asked, complain, has, numbered
from command.chat import base_url
from command.requests import MAYBE_NUMBER, listed, status_of
from command.screen import columns, cut, ms, padded, plain, wide

PARTS = " ▏▎▍▌▋▊▉█"  # eighths of a cell
BAR_MIN = 16
MARK = "·"  # an event inside a span
LISTS = {"latest": {"limit": "20"}, "slow": {"limit": "20", "order": "slowest", "clock": "whole"}}
PHASE = "headgate.phase."
# What is drawn of a request, of its spans and of their events; anything may answer at a URL.
_NUMBER = (int, float)
_Types = Mapping[str, type | tuple[type, ...]]
_REQUEST: _Types = {
    "request_id": str, "tier": str, "model": str, "status": int, "error": str, "arm": str,
    "keep": str, "e2e_s": _NUMBER, "ttft_s": MAYBE_NUMBER,
}  # fmt: skip
_SPAN: _Types = {
    "span_id": str, "parent_id": str, "name": str, "status": str, "events": list,
    "attributes": dict, "start_s": _NUMBER, "end_s": _NUMBER,
}  # fmt: skip


def trace(name: str, url: str | None, *, as_json: bool) -> int:
    """The exit code. `latest` and `slow` list what is kept."""
    if name in LISTS:
        return listed(url, LISTS[name], as_json=as_json)
    try:
        told = read(name, url)
    except (Refused, AnswerError) as error:
        return complain(error)
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        width = shutil.get_terminal_size((100, 40)).columns
        click.echo("\n".join(map(plain, drawn(told, width))))
    return 0


def read(name: str, url: str | None) -> dict[str, Any]:
    """What the gateway tells. Raises Refused, and AnswerError for what no gateway of ours would
    answer."""
    where = f"{base_url(url)}/admin/traces/{urllib.parse.quote(name, safe='')}"
    told = numbered(asked(where, ADMIN, CLIENT))
    if not is_trace(told):
        raise AnswerError(
            f"{where} did not answer with a trace: no gateway of Headgate, or one of another "
            "version, is there; give its address with --url"
        )
    return dict(told)


def is_trace(told: object) -> bool:
    """Whether it is one trace with its spans, of which each has an id and one has no parent."""
    if not (has(told, {**_REQUEST, "trace_id": str, "spans": list}) and isinstance(told, dict)):
        return False
    spans = told["spans"]
    if not all(has(one, _SPAN) and _numbers(one) for one in spans):
        return False
    ids = {one["span_id"] for one in spans}
    return all(one["span_id"] for one in spans) and any(
        one["parent_id"] not in ids for one in spans
    )


def _numbers(span: Mapping[str, Any]) -> bool:
    """Whether its events have a time and its phases seconds."""
    return all(has(event, {"at_s": _NUMBER}) for event in span["events"]) and all(
        isinstance(value, _NUMBER)
        for name, value in span["attributes"].items()
        if name.startswith(PHASE)
    )


def drawn(told: Mapping[str, Any], width: int) -> list[str]:
    """The request in a line, its spans as a tree with bars, and where the time went."""
    spans = told["spans"]
    began = min(span["start_s"] for span in spans)
    whole_s = max(span["end_s"] for span in spans) - began
    tree = list(in_order(spans))
    names = [cut(f"{'  ' * depth}{span['name']}") for depth, span in tree]
    text = max(map(wide, names))
    bar = max(BAR_MIN, width - text - 13)
    status = status_of(told)
    lines = [
        f"{told['request_id']}  {told['tier']}  {told['model']}  {status}  {ms(told['e2e_s'])}",
        f"trace {told['trace_id']}",
        *about(told),
        "",
    ]
    for text_of, (_, span) in zip(names, tree, strict=True):
        drawing = bar_of(span, began, whole_s, bar)
        failed = " !" if span["status"] == "ERROR" else ""
        took = ms(span["end_s"] - span["start_s"])
        lines.append(f"{padded(text_of, text)} {drawing} {took:>10}{failed}".rstrip())
    lines += ["", *phases(tree[0][1]["attributes"])]
    return lines


def about(told: Mapping[str, Any]) -> list[str]:
    """Who asked, who answered, and how many tokens; nothing that is not told."""
    facts = [
        f"tenant {cut(tenant)}" if isinstance(tenant := told.get("tenant"), str) and tenant else "",
        cut(replica) if isinstance(replica := told.get("replica"), str) else "",
        cut(told["arm"]),
        f"kept: {cut(told['keep'])}" if told["keep"] else "",
    ]
    first_s, prompt, answer = told["ttft_s"], told.get("prompt_tokens"), told.get("answer_tokens")
    cached, further_s = told.get("cached_tokens"), told.get("tpot_s")
    tokens = [
        f"first token {ms(first_s)}" if first_s is not None else "",
        f"each further {ms(further_s)}" if isinstance(further_s, _NUMBER) else "",
        f"{prompt:,} prompt tokens" if isinstance(prompt, int) else "",
        f"{cached:,} of them cached" if isinstance(cached, int) else "",
        f"{answer:,} answered" if isinstance(answer, int) else "",
    ]
    return [line for one in (facts, tokens) if (line := ", ".join(filter(None, one)))]


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
