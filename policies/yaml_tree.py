"""YAML text -> plain values and the place of every key and value. The sole importer of ruamel.

Takes YAML 1.2 (core schema) event by event from ruamel's parser. Tags, duplicate keys and several
documents are refused; aliases are bounded by what they expand to. Knows no schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
)
from ruamel.yaml.reader import ReaderError

from policies.problems import Place, Places, PolicyError, Problem, dotted

NODES_MAX = 10_000  # after aliases are expanded
DEPTH_MAX = 32
NUMBER_CHARS_MAX = 64


def parse(file: str, text: str) -> tuple[Any, Places, list[Problem]]:
    """Values, places, and what was wrong without being the end of it.

    Raises PolicyError where the text is no YAML, or more of it than a policy needs.
    """
    tree = _Tree()
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            tree.take(event)
    except _RefusalError as refusal:
        raise PolicyError(Problem(file, refusal.message, refusal.place)) from None
    except YAMLError as error:
        raise PolicyError(_syntax_problem(file, text, error)) from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
        # ruamel's scanner lets these out, without a place, for a few malformed escapes.
        raise PolicyError(Problem(file, f"not valid YAML: {error}", Place(1, 1))) from None
    plain = _Plain()
    data = plain.of(tree.root, ()) if tree.root else None
    if data is None:  # an empty file
        data = {}
    places = Places(plain.keys, plain.values or {(): Place(1, 1)})
    problems = [
        Problem(file, refusal.message, refusal.place, refusal.path)
        for refusal in (*tree.refused, *plain.refused)
    ]
    return data, places, problems


_HINTS = {
    "mapping values are not allowed here": "quote a value that holds ': ', or mend the indent",
    "found character '\\t'": "indent with spaces",
    "could not find expected ':'": "a key needs ': ' after it",
}


def _syntax_problem(file: str, text: str, error: YAMLError) -> Problem:
    lines = text.split("\n")
    if isinstance(error, ReaderError):
        before = text[: error.position]
        place = Place(before.count("\n") + 1, len(before) - before.rfind("\n"))
        character = error.character
        shown = chr(character) if isinstance(character, int) else character
        return Problem(file, f"character {shown!r} is not allowed in YAML", place)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line, column = (mark.line, mark.column) if mark else (0, 0)
    if line >= len(lines) or (line == len(lines) - 1 and not lines[line]):
        line = max(i for i, content in enumerate(lines) if content or i == 0)
        column = len(lines[line])
    message = str(error).partition("\n")[0]
    if isinstance(error, MarkedYAMLError):
        message = ", ".join(filter(None, (error.context, error.problem))) or message
    hint = next((hint for start, hint in _HINTS.items() if start in message), None)
    message = f"not valid YAML: {message}" + (f" ({hint})" if hint else "")
    return Problem(file, message, Place(line + 1, column + 1))


# ---- from events to a tree ----------------------------------------------------------------------

Scalar = str | int | float | bool | None


@dataclass(slots=True)
class _Node:
    """A scalar, a list (`items`), or a mapping (`pairs`)."""

    place: Place
    scalar: Scalar = None
    items: list[_Node] | None = None
    pairs: list[tuple[_Node, _Node]] | None = None
    size: int = 1  # nodes, aliases expanded
    height: int = 1
    key: _Node | None = None  # of an open mapping: the key that waits for its value

    def adopt(self, child: _Node) -> None:
        self.size += child.size
        self.height = max(self.height, child.height + 1)
        if self.items is not None:
            self.items.append(child)
        elif self.pairs is not None and self.key is not None:
            self.pairs.append((self.key, child))
            self.key = None
        else:
            self.key = child


@dataclass(slots=True, eq=False)
class _RefusalError(Exception):
    """YAML that is well formed and still not taken."""

    message: str
    place: Place
    path: str = ""


@dataclass(slots=True)
class _Tree:
    """Takes the parser's events; `root` is the document."""

    root: _Node | None = None
    open: list[tuple[_Node, str | None]] = field(default_factory=list)  # with their anchors
    anchors: dict[str, _Node] = field(default_factory=dict)
    refused: list[_RefusalError] = field(default_factory=list)
    documents: int = 0

    def take(self, event: Event) -> None:
        place = Place(event.start_mark.line + 1, event.start_mark.column + 1)
        if isinstance(event, DocumentStartEvent):
            self._start_document(event, place)
        elif isinstance(event, MappingEndEvent | SequenceEndEvent):
            self._close(*self.open.pop())
        elif isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise _RefusalError(f"alias *{event.anchor} has no anchor before it", place)
            self._close(self.anchors[event.anchor], None)
        elif isinstance(event, NodeEvent):
            self._start_node(event, place)

    def _start_document(self, event: DocumentStartEvent, place: Place) -> None:
        self.documents += 1
        if self.documents > 1:
            raise _RefusalError("a second document starts here, expected one", place)
        if event.version is not None and tuple(event.version) != (1, 2):
            version = ".".join(map(str, event.version))
            raise _RefusalError(f"YAML {version} is asked for, only YAML 1.2 is read", place)

    def _start_node(self, event: Any, place: Place) -> None:
        if event.tag is not None:
            self.refused.append(_RefusalError(f"tag {str(event.tag)[:60]!r} is not allowed", place))
        if isinstance(event, CollectionStartEvent):
            if len(self.open) >= DEPTH_MAX:
                raise _RefusalError(f"nested deeper than {DEPTH_MAX} levels", place)
            is_mapping = isinstance(event, MappingStartEvent)
            node = _Node(place, pairs=[]) if is_mapping else _Node(place, items=[])
            self.open.append((node, event.anchor))
        elif isinstance(event, ScalarEvent):
            plain = event.implicit[0] and event.tag is None
            scalar = _resolve(event.value) if plain else event.value
            self._close(_Node(place, scalar=scalar), event.anchor)

    def _close(self, node: _Node, anchor: str | None) -> None:
        if anchor is not None:
            self.anchors[anchor] = node
        if not self.open:
            self.root = node
            return
        parent, _ = self.open[-1]
        parent.adopt(node)
        if parent.size > NODES_MAX:
            raise _RefusalError(f"holds more than {NODES_MAX} values, aliases included", node.place)
        if parent.height > DEPTH_MAX:
            raise _RefusalError(f"nested deeper than {DEPTH_MAX} levels", node.place)


_CONSTANTS: dict[str, Scalar] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
_INTEGER = re.compile(r"[-+]?[0-9]+")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def _resolve(text: str) -> Scalar:
    """A plain scalar by the core schema (YAML 1.2.2, 10.3.2); overlong numbers stay text."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > NUMBER_CHARS_MAX:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OCTAL_OR_HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


# ---- from a tree to plain values ----------------------------------------------------------------


@dataclass(slots=True)
class _Plain:
    """Expands a tree into dictionaries and lists, and remembers where each path stands."""

    keys: dict[tuple[str | int, ...], Place] = field(default_factory=dict)
    values: dict[tuple[str | int, ...], Place] = field(default_factory=dict)
    refused: list[_RefusalError] = field(default_factory=list)

    def of(self, node: _Node, path: tuple[str | int, ...]) -> Any:
        self.values[path] = node.place
        if node.items is not None:
            return [self.of(item, (*path, at)) for at, item in enumerate(node.items)]
        if node.pairs is not None:
            return dict(self._pairs(node.pairs, path))
        return node.scalar

    def _pairs(
        self, pairs: list[tuple[_Node, _Node]], path: tuple[str | int, ...]
    ) -> Iterator[tuple[str, Any]]:
        for key, value in pairs:
            if key.items is not None or key.pairs is not None:
                self.refused.append(_RefusalError("keys are text", key.place, dotted(path)))
                continue
            name = "null" if key.scalar is None else str(key.scalar)
            name = name.encode("utf-8", "backslashreplace").decode()
            here = (*path, name)
            first = self.keys.get(here)
            if first is not None:
                message = f"given twice; the first is on line {first.line}"
                self.refused.append(_RefusalError(message, key.place, dotted(here)))
                continue
            self.keys[here] = key.place
            yield name, self.of(value, here)
