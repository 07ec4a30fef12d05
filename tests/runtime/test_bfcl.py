"""Every list of functions of a public function-calling benchmark: rendered, compiled, called right.

The Berkeley Function Calling Leaderboard (v4) writes Python's names of types; a client of ours
sends JSON schemas, so they are rewritten as such a client would.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cache.tokens import Tokenizer
from runtime.grammar import GrammarFailed, Grammars
from runtime.lark import GrammarRefused, GrammarSpec
from runtime.tool_forms import Tool
from runtime.tool_grammar import call_grammar
from runtime.tool_request import tool_use
from runtime.tools import DIALECTS, dialect_of
from runtime.wire import ChatRequest
from tests.runtime.call_styles import Call, pocket

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "evals"
pytestmark = pytest.mark.skipif(
    not (DATA / "bfcl").is_dir(), reason=f"needs the function-calling rows in {DATA}"
)
TARGET = Path(__file__).parents[2] / "pocket" / "target"
TYPES = {"dict": "object", "float": "number", "tuple": "array"}
PARTS = 4  # so that one test stays short


@cache
def rows() -> list[tuple[list[dict[str, Any]], Any]]:
    """(functions, right calls) of all single-turn rows, and the functions of the others."""
    found: dict[str, tuple[list[dict[str, Any]], Any]] = {}
    for path in sorted((DATA / "bfcl").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if row.get("function"):
                    key = json.dumps([row["function"], row["ground_truth"]])
                    found[key] = (row["function"], row["ground_truth"])
    with gzip.open(DATA / "bfcl_multi_turn_func_doc.json.gz", "rt", encoding="utf-8") as file:
        docs = json.load(file)
    return [*found.values(), *((functions, None) for functions in docs.values())]


def name_of(function: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_-]", "_", function)[:64]


def schema_of(value: Any) -> Any:
    """Python's names of types as JSON's; `any` is no type at all."""
    if isinstance(value, list):
        return [schema_of(one) for one in value]
    if not isinstance(value, dict):
        return value
    schema = {key: schema_of(one) for key, one in value.items()}
    kind = schema.get("type")
    if kind == "any":
        del schema["type"]
    elif isinstance(kind, str):
        schema["type"] = TYPES.get(kind, kind)
    return schema


def tools_of(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    named = {
        name_of(one["name"]): {
            "name": name_of(one["name"]),
            "description": one.get("description", ""),
            "parameters": schema_of(one["parameters"]),
        }
        for one in functions
    }
    return [{"type": "function", "function": one} for one in named.values()]


def contradicts_itself(value: Any) -> bool:
    """A few schemas ask for a list, or a number, that is one of some texts: nothing obeys them."""
    if isinstance(value, list):
        return any(map(contradicts_itself, value))
    if not isinstance(value, dict):
        return False
    options = value.get("enum")
    if isinstance(options, list) and value.get("type") in ("array", "integer", "float"):
        return any(isinstance(one, str) for one in options)
    return any(map(contradicts_itself, value.values()))


def in_order(value: Any, schema: Any) -> Any:
    """An object's members in the order of its schema, which is what a grammar writes."""
    if not isinstance(value, dict) or not isinstance(schema, dict):
        return value
    properties = schema.get("properties", {})
    known = {key: in_order(value[key], properties[key]) for key in properties if key in value}
    return known | {key: one for key, one in value.items() if key not in known}


def right_calls(truth: Any, tools: list[dict[str, Any]]) -> Iterator[Call]:
    """The calls of a row, the first of the allowed values each, where these obey the schema."""
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    for call in truth or ():
        ((function, given),) = call.items()
        schema = schemas[name_of(function)] | {"additionalProperties": False}
        arguments = {key: values[0] for key, values in given.items() if values[0] != ""}
        if jsonschema.Draft202012Validator(schema).is_valid(arguments):
            yield Call(name_of(function), in_order(arguments, schema))


@pytest.mark.parametrize("part", range(PARTS))
def test_every_list_of_functions_renders_compiles_and_takes_its_right_calls(part: int) -> None:
    """Checked as a request's tools, shown by pocket's template, forced in pocket's dialect; a right
    call that obeys its schema is never ruled out."""
    tokenizer = Tokenizer.load(TARGET)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    ask = [{"role": "user", "content": "Hi"}]
    taken = 0
    for functions, truth in rows()[part::PARTS]:
        tools = tools_of(functions)
        request = {"model": "pocket", "messages": ask, "tools": tools, "tool_choice": "required"}
        use = tool_use(ChatRequest.model_validate(request), tokenizer)
        assert use is not None
        assert [tool.name for tool in use.wanted] == [one["function"]["name"] for one in tools]
        shown = tokenizer.template(tools).render(ask, tools=tools)
        assert all(f'"name": {json.dumps(tool.name)}' in shown for tool in use.wanted)
        text = call_grammar(use.dialect, use.template, use.wanted, use.special, parallel=True)
        try:
            compiled = grammars.compile(GrammarSpec("grammar", text))
        except GrammarRefused as error:
            assert "nsatisfiable" in str(error)
            assert contradicts_itself(functions)
            continue
        calls = list(right_calls(truth, tools))
        if not calls:
            continue
        grammar = compiled.begin()
        try:
            for token in tokenizer.encode(pocket(calls), special=False):
                grammar.accept(token)
        except GrammarFailed as error:
            pytest.fail(f"{error}: {pocket(calls)} of {json.dumps(tools)}")
        assert grammar.may_end
        taken += 1
    assert taken > 200


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda one: one.name)
def test_every_dialect_compiles_a_share_of_the_lists(dialect: Any) -> None:
    """Thirteen dialects, each with its own part of the lists."""
    tokenizer = Tokenizer.load(TARGET)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    template = dialect.marks[0][0]
    assert dialect_of("".join(dialect.marks[0])) is dialect
    for functions, _ in rows()[DIALECTS.index(dialect) :: 4 * len(DIALECTS)]:
        tools = [
            Tool(one["function"]["name"], one["function"]["parameters"])
            for one in tools_of(functions)
        ]
        if contradicts_itself(functions):
            continue
        text = call_grammar(dialect, template, tools, {}, parallel=True)
        grammars.compile(GrammarSpec("grammar", text))
