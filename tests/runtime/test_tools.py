"""Tool calls in generated text: read as they come, the same however they are cut, nothing lost."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from runtime.shapes import Piece, TokenLogprob
from runtime.tool_answers import ToolReply
from runtime.tool_reader import Arguments, Closed, Event, Opened, Text
from runtime.tool_request import ToolUse
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


GOOD = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
CALLED = ("f", '{"a": 1}', True)
# dialect, what the model wrote, the content, the calls
EXAMPLES: dict[str, tuple[str, str, str, list[tuple[str, str, bool]]]] = {
    "no JSON": ("hermes", "<tool_call>hello</tool_call>", "<tool_call>hello</tool_call>", []),
    "no name": ("hermes", '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "a list of arguments": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [],
    ),
    "text as name": ("hermes", '<tool_call>{"name": 5', '<tool_call>{"name": 5', []),
    "no arguments": ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}", True)]),
    "null arguments": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        "",
        [("f", "{}", True)],
    ),
    "an unknown function": (
        "hermes",
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "",
        [("g", "{}", True)],
    ),
    "a brace too few": ("hermes", GOOD.replace("}}", "}"), "", [CALLED]),
    "broken off by its end": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> so',
        " so",
        [("f", '{"a": 1', True)],
    ),
    "cut in the arguments": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": ',
        "",
        [("f", '{"a": ', False)],
    ),
    "cut in the end": ("hermes", GOOD[:-4], "", [CALLED]),
    "no end": ("hermes", GOOD.removesuffix("</tool_call>"), "", [CALLED]),
    "text around": ("hermes", f"Now: {GOOD} done.", "Now:  done.", [CALLED]),
    "blanks around": ("hermes", f" \n{GOOD}\n {GOOD}\n", "", [CALLED, CALLED]),
    "garbage, then a call": ("hermes", f"<tool_call> x {GOOD}", "<tool_call> x ", [CALLED]),
    "garbage in the list": (
        "granite",
        '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, oops]',
        ", oops]",
        [CALLED],
    ),
    "an empty list": ("granite", "<|tool_call|>[]", "<|tool_call|>[]", []),
    "other JSON": ("llama_json", '{"a": 1, "name": "f"}', '{"a": 1, "name": "f"}', []),
    "not at the start": (
        "llama_json",
        'So: {"name": "f", "parameters": {"a": 1}}',
        'So: {"name": "f", "parameters": {"a": 1}}',
        [],
    ),
    "an unknown look-alike": (
        "llama_json",
        '{"name": "Ann", "parameters": {}}',
        '{"name": "Ann", "parameters": {}}',
        [],
    ),
    "code": ("llama_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    "a list of numbers": ("pythonic", "[1, 2]", "[1, 2]", []),
    "a variable": ("pythonic", "[f(a=b)]", "[f(a=b)]", []),
    "half a call": ("pythonic", "[f(a=1), f(a=", ", f(a=", [CALLED]),
    "JSON's words": ("olmo3", "<function_calls>f(a=true)", "", [("f", '{"a": true}', True)]),
    "a place of action": ("command_r", "Action: none", "Action: none", []),
    "answered directly": (
        "command_r",
        'Action: ```json [{"tool_name": "directly-answer", "parameters": {}}]```',
        'Action: ```json [{"tool_name": "directly-answer", "parameters": {}}]```',
        [],
    ),
    "a tag in prose": ("qwen3_coder", "Use <tool_call> for it", "Use <tool_call> for it", []),
    "text between arguments": (
        "qwen3_coder",
        "<function=f><parameter=a>1</parameter> and </function>",
        " and </function>",
        [("f", '{"a": 1}', True)],
    ),
    "cut in a text": (
        "qwen3_coder",
        "<function=Order2>\n<parameter=city>\nOs",
        "",
        [("Order2", '{"city": "Os', False)],
    ),
    "a word in tags": (
        "glm4_moe",
        "<tool_call>word</tool_call>",
        "<tool_call>word</tool_call>",
        [],
    ),
    "a name and no more": ("glm4_moe", "<tool_call>f</tool_call>", "", [("f", "{}", True)]),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_what_models_write_amiss(example: str) -> None:
    """What is no call is content, to the character; what is one already stays one."""
    name, written, content, calls = EXAMPLES[example]
    functions = {"Order2": {"properties": {"city": {"type": "string"}}}}
    for pieces in ([written], list(written)):
        assert put_together(read(BY_NAME[name], pieces, **functions)) == (content, calls)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("12", {"type": "integer"}, 12),
        ("12", {"type": "string"}, "12"),
        ("12", {}, 12),
        ("twelve", {"type": "integer"}, "twelve"),
        ("12", {"type": ["string", "null"]}, "12"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"type": ["integer", "null"]}, None),
        ("True", {"type": "boolean"}, True),
        ("3", {"type": "number"}, 3),
        ("1e999", {"type": "number"}, "1e999"),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("5", {"enum": ["5", "6"]}, "5"),
        ("5", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 5),
        ("5", {"$ref": "#/$defs/Text"}, "5"),
        ("\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace"), {}, "\ufffd"),
    ],
)
def test_a_tagged_value_is_what_its_schema_says(text: str, schema: Any, value: Any) -> None:
    """Tags carry text; whether `12` is a number, the tool's schema tells."""
    parameters = {"properties": {"a": schema}, "$defs": {"Text": {"type": "string"}}}
    written = f"<tool_call>f<arg_key>a</arg_key><arg_value>{text}</arg_value></tool_call>"
    _, ((_, arguments, _),) = put_together(read(BY_NAME["glm4_moe"], [written], f=parameters))
    assert json.loads(arguments) == {"a": value}


def test_ids_are_what_the_templates_take() -> None:
    """Mistral's takes 9 letters or digits, Kimi's the function and a number that goes on."""
    written = {"hermes": "pocket", "mistral": "mistral args", "kimi_k2": "kimi"}
    ids = {}
    for name, style in written.items():
        use = ToolUse(BY_NAME[name], "", {}, (), forced=False, parallel=True, past_calls=3)
        text = STYLES[style][1]([Call("f", {}), Call("f", {"a": 1})])
        pieces = ToolReply(use, 0).read(Piece(0, text, None, "stop"))
        assert pieces[-1].finish_reason == "tool_calls"
        ids[name] = [piece.call.id for piece in pieces if piece.call and piece.call.id]
        assert len(set(ids[name])) == 2
    assert ids["kimi_k2"] == ["functions.f:3", "functions.f:4"]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", one) for one in ids["mistral"])
    assert all(re.fullmatch("call_[a-zA-Z0-9]{24}", one) for one in ids["hermes"])


def test_log_probabilities_wait_for_their_text() -> None:
    """Tokens of a mark that is still coming are told with the text or the call that they become."""
    tokens = ["Go", " <tool", "_call>", ' {"name": "f", "arguments": {', "}}", "</tool_call>"]
    use = ToolUse(BY_NAME["hermes"], "", {}, (), forced=False, parallel=True, past_calls=0)
    reply = ToolReply(use, 0)
    told: list[list[str]] = []
    for at, token in enumerate(tokens):
        entry = TokenLogprob(token, at, token.encode(), -1.0)
        reason = "stop" if token == tokens[-1] else None
        pieces = reply.read(Piece(0, token, (entry,), reason))
        told += [[one.token for one in piece.logprobs or ()] for piece in pieces]
    assert told == [["Go"], [" <tool"], tokens[2:4], [], ["}}"], ["</tool_call>"]]


def test_half_a_surrogate_pair_leaves_valid_text() -> None:
    """Arguments that were decoded on the way are escaped again: an answer is UTF-8."""
    written = [
        ("hermes", r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\ud800\"}"}</tool_call>'),
        ("pythonic", r'[f(a="\ud83d\ude42 \ud800")]'),
    ]
    for name, text in written:
        _, ((_, arguments, _),) = put_together(read(BY_NAME[name], [text]))
        arguments.encode()
        assert json.loads(arguments)["a"].endswith("\ud800")
