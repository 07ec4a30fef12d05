"""Rows of recorded traffic from the lines of a file, by the formats that people have.

Knows what each format calls things, and what a row of it must have; knows no files and no
servers.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import orjson

from evals import spans

SAME_BEGINNING_CHARS = 256

Lines = list[tuple[int, str]]  # number from 1, text; none of them empty


class TraceError(Exception):
    """A file that is no trace; its text is `file:line  problem`."""

    def __init__(self, file: str, line: int | None, problem: str) -> None:
        super().__init__(f"{file}:{line}  {problem}" if line else f"{file}  {problem}")


@dataclass(frozen=True, slots=True)
class Row:
    """One request. With a `body` it is sent as it was; else text of `prompt_tokens` is made up, the
    same for the same `blocks`, and `output_tokens` are asked for."""

    t_s: float  # since the trace's begin
    body: Mapping[str, Any] | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    blocks: tuple[int, ...] = ()
    id: str = ""  # the same in every arm
    cluster: str = ""  # conversation or document; "": the row is one of its own
    turn: int = 0
    tier: str = ""
    expected: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)


# ---- the formats --------------------------------------------------------------------------------


def _mooncake(file: str, lines: Lines) -> Iterator[Row]:
    """`timestamp` in ms, `input_length`, `output_length`, `hash_ids` of 512 tokens each.

    Its clock ticks every few seconds: rows of one tick are spread evenly up to the next one.
    """
    rows = []
    for number, line in lines:
        given = object_of(file, number, line)
        ids = given.get("hash_ids") or []
        if not isinstance(ids, list) or not all(type(one) is int for one in ids):
            raise TraceError(file, number, "hash_ids: expected a list of integers")
        # The first block is a system prompt that all share; the second one tells documents apart.
        cluster = f"block-{ids[1]}" if len(ids) > 1 else ""
        rows.append(
            Row(
                _count(file, number, given, "timestamp", float) / 1000,
                prompt_tokens=_count(file, number, given, "input_length"),
                output_tokens=_count(file, number, given, "output_length"),
                blocks=tuple(ids),
                cluster=cluster,
            )
        )
    return iter(_spread(rows))


def _spread(rows: list[Row]) -> list[Row]:
    """Rows of the same moment, evenly up to the next moment that has any; the last ones stay."""
    rows.sort(key=lambda row: row.t_s)
    ticks: dict[float, int] = {}
    for row in rows:
        ticks[row.t_s] = ticks.get(row.t_s, 0) + 1
    nexts = dict(zip(ticks, [*list(ticks)[1:], None], strict=True))
    spread, place = [], dict.fromkeys(ticks, 0)
    for row in rows:
        until = nexts[row.t_s]
        share = place[row.t_s] / ticks[row.t_s]
        place[row.t_s] += 1
        spread.append(replace(row, t_s=row.t_s + share * (until - row.t_s)) if until else row)
    return spread


def _headgate(file: str, lines: Lines) -> Iterator[Row]:
    """Whole requests: `t_ms` or `t_s`, `body`, and where known `id`, `cluster`, `session`,
    `tenant`, `tier`, `turn`, `expected`."""
    for number, line in lines:
        given = object_of(file, number, line)
        body = given.get("body")
        if not isinstance(body, dict) or not ("messages" in body or "prompt" in body):
            raise TraceError(file, number, "body: expected a request with `messages` or `prompt`")
        ms = "t_ms" in given
        t_s = _count(file, number, given, "t_ms" if ms else "t_s", float) / (1000 if ms else 1)
        known = ("tenant", "kind", "session", "eval")
        yield Row(
            t_s,
            body=body,
            id=str(given.get("id", "")),
            cluster=str(given.get("cluster") or given.get("session") or beginning(body)),
            turn=int(given.get("turn", turn_of(body))),
            tier=str(given.get("tier", "")),
            expected=given.get("expected", (given.get("eval") or {}).get("answers")),
            meta={name: given[name] for name in known if name in given},
        )


def _otel(file: str, lines: Lines) -> Iterator[Row]:
    """GenAI spans, as the gateway's recorder and others write them: see `spans.py`."""
    for number, line in lines:
        try:
            for one in spans.requests_of(object_of(file, number, line)):
                body = one.body
                yield Row(
                    one.start_s,
                    body=body,
                    prompt_tokens=one.prompt_tokens,
                    output_tokens=one.output_tokens,
                    id=one.id,
                    cluster=one.conversation or (beginning(body) if body else ""),
                    turn=turn_of(body) if body else 0,
                    tier=one.tier,
                    expected=one.answer,
                    meta=one.meta,
                )
        except spans.NoSpan as error:
            raise TraceError(file, number, str(error)) from None


def _csv(
    prompt: str, output: str, when: str, moment: Callable[[str], float], tenant: str | None = None
) -> Callable[[str, Lines], Iterator[Row]]:
    """A reader of a table of lengths, by the names of its columns in small letters."""

    def read(file: str, lines: Lines) -> Iterator[Row]:
        header = [one.strip().lower() for one in next(csv.reader([lines[0][1]]))]
        for number, line in lines[1:]:
            given = dict(zip(header, next(csv.reader([line])), strict=False))
            try:
                t_s = moment(given.get(when, ""))
            except ValueError:
                problem = f"{when}: expected a moment, got {given.get(when)!r}"
                raise TraceError(file, number, problem) from None
            meta = {"tenant": given[tenant]} if tenant and given.get(tenant) else {}
            output_tokens = _count(file, number, given, output)
            if output_tokens:  # BurstGPT marks a request that failed by 0
                yield Row(t_s, None, _count(file, number, given, prompt), output_tokens, meta=meta)

    return read


def _stamp(text: str) -> float:
    """`2023-11-16 18:15:46.6805900`, in seconds since 1970. Raises ValueError."""
    moment = datetime.fromisoformat(text.strip())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


FORMATS: Mapping[str, Callable[[str, Lines], Iterable[Row]]] = {
    "headgate": _headgate,
    "otel": _otel,
    "mooncake": _mooncake,
    "azure": _csv("contexttokens", "generatedtokens", "timestamp", _stamp),
    "burstgpt": _csv("request tokens", "response tokens", "timestamp", float, "model"),
    "servegen": _csv("input_tokens", "output_tokens", "t_s", float, "client"),
}


# ---- what a body tells of its conversation ------------------------------------------------------


def beginning(body: Mapping[str, Any]) -> str:
    """A name for what requests share that begin with the same words after the system prompt: a
    conversation, or a document that several questions are asked about."""
    messages = body.get("messages")
    if isinstance(messages, list):
        said = (one for one in messages if isinstance(one, dict))
        text = next((one.get("content") for one in said if one.get("role") not in _SYSTEM), "")
    else:
        text = body.get("prompt")
    whole = text if isinstance(text, str) else orjson.dumps(text).decode()
    return blake2b(whole[:SAME_BEGINNING_CHARS].encode(), digest_size=8).hexdigest()


_SYSTEM = ("system", "developer")


def turn_of(body: Mapping[str, Any]) -> int:
    """Questions before this one, as far as the request has them."""
    roles = [one.get("role") for one in body.get("messages") or () if isinstance(one, dict)]
    return max(roles.count("user") - 1, 0)


def object_of(file: str, number: int, line: str) -> dict[str, Any]:
    try:
        given = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise TraceError(file, number, f"is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise TraceError(file, number, "expected a JSON object")
    return given


def _count(
    file: str, number: int, given: Mapping[str, Any], name: str, kind: Callable[[Any], Any] = int
) -> Any:
    """The number that a row has under a name, at least 0."""
    try:
        value = kind(given[name])
        if value < 0 or not math.isfinite(value):
            raise ValueError
    except KeyError:
        raise TraceError(file, number, f"{name}: missing") from None
    except (TypeError, ValueError):
        problem = f"{name}: expected a number of at least 0, got {given[name]!r}"
        raise TraceError(file, number, problem) from None
    return value
