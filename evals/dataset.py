"""A suite and its rows, read and checked: YAML + JSONL -> Items.

Knows files and conversations; knows no scorer and no server. Each problem says its file and line.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from evals.item import Item
from policies.load import load_suite_file, read_yaml
from policies.problems import Place, PolicyError, Problem, closest, dotted
from policies.suite import Scorer, SuiteFile

FILE_BYTES_MAX = 2**30
PROBLEMS_MAX = 20
# What a row says to the server; all else but the cluster is told to scorers.
_ASKED = (
    "tools", "tool_choice", "response_format", "max_tokens", "max_completion_tokens",
    "temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs", "echo",
    "chat_template_kwargs",
)  # fmt: skip
_FORMS = ("messages", "prompt", "turns")
_ROW = ("id", *_FORMS, "system", "turn", "tier", "expected")


@dataclass(frozen=True, slots=True)
class Suite:
    """As a file says it, with its rows."""

    name: str
    items: tuple[Item, ...]
    scorers: tuple[Scorer, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    given: Mapping[str, Any]


class _Problems:
    """What is wrong with the rows, up to a number that people can read."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[Problem] = []

    def add(self, line: int, path: str, message: str, suggestion: str | None = None) -> None:
        self.found.append(Problem(self.file, message, Place(line, 1), path, suggestion))
        if len(self.found) == PROBLEMS_MAX:
            raise PolicyError(*self.found)


def load_suite(path: str | Path, *, allow_code: bool = False) -> Suite:
    """The suite in a file, with its rows. Raises PolicyError with every problem that was found.

    `allow_code`: whether code that models wrote may be run, where a scorer asks for it.
    """
    said = load_suite_file(path)
    _refuse_code(str(path), said, allow_code)
    file = Path(path).absolute().parent / said.data
    problems = _Problems(str(file))
    rows = list(_rows(_read(file), problems))
    items = [(row, item) for row in rows for item in _items(said, row, problems)]
    _refuse_twice(items, problems)
    if not problems.found:
        _refuse_torn_conversations(said, items, problems)
        _refuse_unscored(said.scorers, items, problems)
    if not items and not problems.found:
        problems.add(1, "", "has no row")
    if problems.found:
        raise PolicyError(*sorted(problems.found, key=_line))
    return Suite(said.name, tuple(item for _, item in items), said.scorers)


def _line(problem: Problem) -> int:
    return problem.place.line if problem.place else 0


def scorer_takes(scorer: Scorer, item: Item) -> bool:
    return all(str(item.meta.get(name, "")) == value for name, value in scorer.where.items())


def value_of(item: Item, field: str) -> Any:
    """What a row has under the name of a field, None where it has none."""
    return item.expected if field == "expected" else item.meta.get(field)


def _refuse_code(path: str, said: SuiteFile, allow_code: bool) -> None:
    """What models wrote is run only where somebody asked for it, and where it can be held in."""
    index = next((at for at, one in enumerate(said.scorers) if one.kind == "code"), None)
    if index is None:
        return
    why = "runs what the model wrote, which is done only where asked for: --allow-code"
    if allow_code:
        from evals.scorers.sandbox import NoSandbox, try_sandbox

        try:
            try_sandbox()
            return
        except NoSandbox as error:
            why = f"code cannot be held in on this machine: {error}"
    _, places, _ = read_yaml(path)
    where = ("scorers", index, "kind")
    raise PolicyError(Problem(path, why, places.of(where), dotted(where)))


# ---- rows ---------------------------------------------------------------------------------------


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            raise PolicyError(Problem(str(file), f"is larger than {FILE_BYTES_MAX} bytes"))
        data = file.read_bytes()
    except OSError as error:
        raise PolicyError(Problem(str(file), f"cannot be read: {error.strerror}")) from None
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise PolicyError(Problem(str(file), f"cannot be unpacked: {error}")) from None
    return data.removeprefix(b"\xef\xbb\xbf")


def _rows(data: bytes, problems: _Problems) -> Iterator[_Row]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            given = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            problems.add(number, "", f"is not JSON: {error}")
            continue
        if isinstance(given, dict):
            yield _Row(number, given)
        else:
            problems.add(number, "", "expected a JSON object")


def _items(said: SuiteFile, row: _Row, problems: _Problems) -> Iterator[Item]:
    """The requests of a row: one, or one for each of its `turns`."""
    given = row.given
    if not isinstance(given.get("id"), str | int) or given["id"] == "":
        near = closest("id", list(given)) if "id" not in given else None
        problems.add(row.line, "id", "expected a name that no other row has", near)
        return
    forms = [name for name in _FORMS if name in given]
    if len(forms) != 1:
        wanted = "expected one of `messages`, `prompt` and `turns`"
        near = next(filter(None, (closest(one, _others(given)) for one in _FORMS)), None)
        problems.add(row.line, "", f"{wanted}, got {' and '.join(forms) or 'none'}", near)
        return
    try:
        if forms == ["turns"]:
            yield from _conversation(said, given)
        else:
            yield _single(said, given)
    except _Misshapen as error:
        problems.add(row.line, error.path, str(error))


def _others(given: Mapping[str, Any]) -> list[str]:
    return [name for name in given if name not in (*_ROW, *_ASKED)]


class _Misshapen(Exception):
    """A row whose field is none."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def _single(said: SuiteFile, given: Mapping[str, Any]) -> Item:
    turn = given.get("turn", 0)
    if type(turn) is not int or turn < 0:
        raise _Misshapen("turn", f"expected a number of at least 0, got {turn!r}")
    if "turn" in given and said.cluster not in given:
        raise _Misshapen(
            said.cluster, "missing: a row that has a `turn` names its conversation, so that turns "
            "are not counted as if they were independent",
        )  # fmt: skip
    body = _body(said, given)
    if "messages" in given:
        body["messages"] = _with_system(said, given, _messages(given["messages"]))
    elif not isinstance(given["prompt"], str) or not given["prompt"]:
        raise _Misshapen("prompt", "expected text")
    elif said.ask == "completion":
        body["prompt"] = given["prompt"]
    else:
        question = {"role": "user", "content": given["prompt"]}
        body["messages"] = _with_system(said, given, [question])
    name = str(given["id"])
    return _item(said, given, name, turn, body, given.get("expected"))


def _conversation(said: SuiteFile, given: Mapping[str, Any]) -> Iterator[Item]:
    """Turns of one conversation; each is asked behind the answers that were expected before it."""
    turns = given["turns"]
    if not isinstance(turns, list) or not turns:
        raise _Misshapen("turns", "expected a list of `user` and `expected`")
    told = _with_system(said, given, [])
    name = str(given["id"])
    for number, turn in enumerate(turns):
        where = f"turns[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("user"), str):
            raise _Misshapen(where, "expected `user`, a text, and `expected`")
        told = [*told, {"role": "user", "content": turn["user"]}]
        last = number == len(turns) - 1
        expected = turn.get("expected")
        if not isinstance(expected, str) and not last:
            raise _Misshapen(f"{where}.expected", "expected a text: later turns are asked after it")
        body = {**_body(said, given), "messages": told}
        item = _item(said, given, f"{name}#{number}", number, body, expected)
        yield item if said.cluster in given else replace(item, cluster=name)
        told = [*told, {"role": "assistant", "content": expected}]


def _body(said: SuiteFile, given: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "max_tokens": said.max_tokens, "temperature": said.temperature, "seed": said.seed,
    }  # fmt: skip
    body = {name: value for name, value in defaults.items() if value is not None}
    return body | {name: given[name] for name in _ASKED if name in given}


def _with_system(
    said: SuiteFile, given: Mapping[str, Any], messages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    system = given.get("system", said.system)
    if not system or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _messages(messages: Any) -> list[dict[str, Any]]:
    whole = isinstance(messages, list) and messages
    if not whole or not all(isinstance(one, dict) and "role" in one for one in messages):
        raise _Misshapen("messages", "expected a list of messages with `role` and `content`")
    return list(messages)


def _item(
    said: SuiteFile,
    given: Mapping[str, Any],
    name: str,
    turn: int,
    body: Mapping[str, Any],
    expected: Any,
) -> Item:
    meta = {key: value for key, value in given.items() if key not in _FORMS}
    cluster = str(given.get(said.cluster, name))
    return Item(name, cluster, turn, body, expected, str(given.get("tier", "")), meta)


# ---- rows together ------------------------------------------------------------------------------

_Items = list[tuple[_Row, Item]]


def _refuse_twice(items: _Items, problems: _Problems) -> None:
    lines: dict[str, int] = {}
    for row, item in items:
        first = lines.setdefault(item.id, row.line)
        if first != row.line:
            why = f"{item.id!r} is on line {first} already; ids make the pairs of the two arms"
            problems.add(row.line, "id", why)


def _refuse_torn_conversations(said: SuiteFile, items: _Items, problems: _Problems) -> None:
    """Rows of one conversation that are counted as if they were independent, which makes every
    interval too short.
    """
    named = [said.cluster in row.given or "turns" in row.given for row, _ in items]
    asked = "cluster" in said.model_fields_set
    if asked or any(named):
        for (row, _), has in zip(items, named, strict=True):
            if not has:
                near = closest(said.cluster, _others(row.given))
                why = "missing: each row names its conversation or document, or none does"
                problems.add(row.line, said.cluster, why, near)
    whole = {_said(item.body["messages"]): (row, item) for row, item in items if _chat(item)}
    for row, item in items:
        if not _chat(item):
            continue
        messages = item.body["messages"]
        for length in range(len(messages) - 1, 0, -1):
            before = whole.get(_said(messages[:length]))
            if before is not None and before[1].cluster != item.cluster:
                why = (
                    f"goes on with the conversation of {before[1].id!r} (line {before[0].line}) "
                    f"and is in another cluster; give both rows the same `{said.cluster}`"
                )
                problems.add(row.line, said.cluster, why)
                break


def _chat(item: Item) -> bool:
    return "messages" in item.body


def _said(messages: list[dict[str, Any]]) -> bytes:
    return hashlib.sha256(orjson.dumps(messages, option=orjson.OPT_SORT_KEYS)).digest()


def _refuse_unscored(scorers: Sequence[Scorer], items: _Items, problems: _Problems) -> None:
    from evals.scorers.expectations import unmeetable  # which reads rows by this module

    for row, item in items:
        takers = [one for one in scorers if scorer_takes(one, item)]
        if not takers:
            problems.add(row.line, "", "no scorer takes this row: see `where` of the scorers")
        for scorer in takers:
            if _compares(scorer, item) and value_of(item, scorer.field) is None:
                near = closest(scorer.field, _others(row.given))
                why = f"missing: the scorer {scorer.called!r} compares with it"
                problems.add(row.line, scorer.field, why, near)
            elif said := unmeetable(scorer, item):
                problems.add(row.line, scorer.field, *said)


def _compares(scorer: Scorer, item: Item) -> bool:
    """Whether the scorer needs the row's field."""
    if scorer.kind == "judge":
        return scorer.against == "expected"
    if scorer.kind == "regex":
        return scorer.pattern is None
    if scorer.kind == "instructions":
        return "instruction_id_list" not in item.meta
    return scorer.kind not in ("perplexity", "kl", "bad_output", "refusal", "json")
