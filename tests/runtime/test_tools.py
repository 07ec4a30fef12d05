"""Tool calls in generated text: read as they come, the same however they are cut, nothing lost."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from runtime.tool_reader import Arguments, Closed, Event, Opened, Text
from runtime.tools import DIALECTS, Dialect, ToolParser
from tests.runtime.call_styles import CALLS, CHARACTERS, STYLES, Call

BY_NAME = {dialect.name: dialect for dialect in DIALECTS}
FUNCTIONS: dict[str, dict[str, Any]] = {
    name: {} for name in ("f", "get_weather", "read-file", "Order2")
}
TAGGED = ("qwen3_coder", "glm4_moe")


def read(dialect: Dialect, pieces: list[str], **functions: Any) -> list[Event]:
    parser = ToolParser(dialect, FUNCTIONS | functions)
    return [event for piece in pieces for event in parser.push(piece)] + parser.finish()


def put_together(events: list[Event]) -> tuple[str, list[tuple[str, str, bool]]]:
    """(content, [(name, arguments, complete)]), as a client would put the deltas together."""
    content, calls = "", []
    for event in events:
        match event:
            case Text(text):
                content += text
            case Opened(name):
                assert all(complete for _, _, complete in calls), "a call opens within another"
                calls.append((name, "", False))
            case Arguments(text):
                name, arguments, complete = calls[-1]
                assert not complete, "arguments behind the end of their call"
                calls[-1] = (name, arguments + text, False)
            case Closed():
                calls[-1] = (*calls[-1][:2], True)
    return content, calls


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[one:other] for one, other in itertools.pairwise(at)] or [""]


def adapted(dialect: str, calls: list[Call]) -> list[Call]:
    """What can be written: a tagged value is plain text, without its own end, and no look-alike."""

    def plain(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return f"t {value.replace('</', '< /')}"

    if dialect not in TAGGED:
        return calls
    return [Call(c.name, {key: plain(v) for key, v in c.arguments.items()}) for c in calls]


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None)
@given(calls=CALLS, places=st.lists(st.integers(0, 10**6), max_size=30), before=st.booleans())
def test_calls_come_back_however_they_are_cut(style, calls, places, before):
    """Names, arguments and their order; the text before them is content, exactly."""
    name, write = STYLES[style]
    dialect = BY_NAME[name]
    calls = adapted(name, calls)
    bare = style in ("llama", "pythonic")  # these begin an answer, or are no calls
    said = "Let me see.\n" if before and not bare else ""
    text = said + write(calls)
    content, found = put_together(read(dialect, cut(text, places)))
    assert content == said
    assert [(one[0], json.loads(one[1]), one[2]) for one in found] == [
        (one.name, one.arguments, True) for one in calls
    ]
    assert put_together(read(dialect, [text])) == (content, found)
    assert put_together(read(dialect, list(text))) == (content, found)


MARKS = sorted({mark for dialect in DIALECTS for mark in dialect.markers})
PIECES = st.one_of(
    st.text(CHARACTERS, max_size=6),
    st.sampled_from([*MARKS, '{"name": "f"', '"arguments": {', "f(", "[f(a=1", "}", "]", '"', ","]),
)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda one: one.name)
@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(PIECES, max_size=12), places=st.lists(st.integers(0, 10**6), max_size=30))
def test_anything_is_read_the_same_however_it_is_cut(dialect, pieces, places):
    """Marks, halves of calls and garbage: no crash, and the cuts make no difference."""
    text = "".join(pieces)
    whole = put_together(read(dialect, [text]))
    assert put_together(read(dialect, cut(text, places))) == whole
    assert put_together(read(dialect, list(text))) == whole
    if not whole[1]:
        assert whole[0] == text, "without calls, everything is content"


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda one: one.name)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), places=st.lists(st.integers(0, 10**6), max_size=30))
def test_text_without_calls_is_content(dialect, text, places):
    """To the last character, whitespace too."""
    assert put_together(read(dialect, cut(text, places))) == (text, [])
