"""What a grammar for tool calls lets a model write, the dialect's parser reads as valid calls."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Trained, decoders, models, pre_tokenizers

from cache.tokens import Tokenizer
from runtime.grammar import Grammar, Grammars
from runtime.lark import GrammarSpec
from runtime.tool_forms import Tool, form_of
from runtime.tool_grammar import ANY_TEXT, CannotForce, call_grammar
from runtime.tools import DIALECTS, Dialect, ToolParser
from tests.runtime.call_styles import CALLS, STYLES, Call
from tests.runtime.test_tools import BY_NAME, put_together

END = "<|end|>"
# What a template of the dialect shows where it has several forms.
TEMPLATES = {
    "mistral": ("", "[ARGS]"),
    "phi4": ("", "functools["),
    "deepseek": ("", "```json"),
}
FORMS = [
    (dialect, template) for dialect in DIALECTS for template in TEMPLATES.get(dialect.name, ("",))
]
ids = [f"{dialect.name}{'-' if template else ''}{template}" for dialect, template in FORMS]
every_form = pytest.mark.parametrize(("dialect", "template"), FORMS, ids=ids)


@cache
def tokenizer(dialect: Dialect, special: bool, folder: Path) -> tuple[Tokenizer, Grammars]:
    """A byte a token; the dialect's marks are special tokens, or just text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Trained(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([END, *(sorted(dialect.markers) if special else ())])
    folder = folder / f"{dialect.name}-{special}"
    folder.mkdir()
    tokens.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    loaded = Tokenizer.load(folder)
    return loaded, Grammars(loaded, loaded.vocab_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


class Pen:
    """A grammar that is written in, a token at a time."""

    def __init__(self, tokens: Tokenizer, grammar: Grammar) -> None:
        self.tokens, self.grammar = tokens, grammar
        self.written = b""
        self.end = min(tokens.eos_ids)

    def allowed(self) -> set[int]:
        row = np.zeros(self.grammar.words, np.int32)
        self.grammar.fill(row)
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())

    def put(self, token: int) -> None:
        self.grammar.accept(token)
        if token != self.end:
            self.written += self.tokens.token_bytes(token)

    @property
    def text(self) -> str:
        return self.written.decode("utf-8", "replace")

    def takes(self, text: str) -> bool:
        """Whether the text may be written, and then be the end."""
        for token in self.tokens.encode(text, special=False):
            if token not in self.allowed():
                return False
            self.put(token)
        return self.end in self.allowed()

    def write(self, rng: random.Random, endings: list[str], limit: int = 1500) -> bool:
        """Scribbles, with a bent for what ends something; whether it came to an end."""
        for _ in range(limit):
            allowed = self.allowed()
            assert allowed, f"a dead end behind {self.text!r}"
            if allowed == {self.end} or (self.end in allowed and rng.random() < 0.5):
                return True
            allowed.discard(self.end)
            wanted = [one for one in self._next(endings) if one in allowed]
            known = sorted(one for one in allowed if one >= self.end or self._is_ascii(one))
            token = (
                rng.choice(wanted)
                if wanted and rng.random() < 0.8
                else rng.choice(known or sorted(allowed))
            )
            self.put(token)
        return False

    def _is_ascii(self, token: int) -> bool:
        return self.tokens.token_bytes(token).isascii()

    def _next(self, endings: list[str]) -> Iterator[int]:
        """The tokens that go on with an ending that has begun, or begin one."""
        for ending in endings:
            for length in range(len(ending) - 1, -1, -1):
                if self.written.endswith(ending[:length].encode()):
                    yield self.tokens.encode(ending[length:], special=False)[0]
                    break


def grammar_of(
    tools: list[Tool],
    dialect: Dialect,
    template: str,
    tokens: Tokenizer,
    *,
    parallel: bool = True,
    forced: bool = True,
) -> GrammarSpec:
    special = tokens.special_tokens_of(dialect.markers)
    instead = None if forced else ANY_TEXT
    text = call_grammar(dialect, template, tools, special, parallel=parallel, instead=instead)
    return GrammarSpec("grammar", text)


SIMPLE = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "description": "a text"},
        {"type": "integer"},
        {"type": "number", "minimum": 0, "maximum": 9},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", "dark blue", "1"]},
        {"type": "string", "enum": ["a<b", "c"]},
        {"const": 5},
        {"type": ["string", "null"]},
        {"type": ["integer", "null"]},
        {"$ref": "#/$defs/Point"},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        {
            "type": "object",
            "properties": {"x": {"type": "string", "maxLength": 4}},
            "required": ["x"],
            "additionalProperties": False,
        },
    ]
)
POINT = {
    "type": "object",
    "properties": {"lat": {"type": "integer"}, "name": {"type": "string"}},
    "required": ["lat"],
    "additionalProperties": False,
}
KEYS = ["city", "x_1", "when"]


@st.composite
def schemas(draw: Any) -> dict[str, Any] | None:
    if draw(st.integers(0, 9)) == 0:
        return None
    properties = {key: draw(SIMPLE) for key in draw(st.lists(st.sampled_from(KEYS), unique=True))}
    required = [key for key in properties if draw(st.booleans())]
    schema = {"type": "object", "properties": properties, "required": required}
    return schema | {"$defs": {"Point": POINT}}


TOOLS = st.lists(schemas(), min_size=1, max_size=3).map(
    lambda given: [Tool(f"tool-{at}", schema, strict=True) for at, schema in enumerate(given)]
)


@every_form
@settings(max_examples=15, deadline=None)
@given(
    tools=TOOLS,
    special=st.booleans(),
    parallel=st.booleans(),
    forced=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_what_a_grammar_lets_through_are_calls_that_obey(
    folder, dialect, template, tools, special, parallel, forced, seed
):
    """Nothing but calls where they are forced, one where there may be one; arguments are valid."""
    tokens, grammars = tokenizer(dialect, special, folder)
    spec = grammar_of(tools, dialect, template, tokens, parallel=parallel, forced=forced)
    pen = Pen(tokens, grammars.compile(spec).begin())
    rng = random.Random(seed)
    called = forced or rng.random() < 0.8
    if called and not forced:
        form = form_of(dialect, template)
        begin = form.start + form.head
        opener = next((one for one in dialect.openers if begin.startswith(one)), dialect.bare)
        assert not pen.takes(opener if dialect.bare else f"Well, {opener}")
    if not pen.write(rng, ['"', "}", "]", ")", *dialect.calls.markers]):
        return
    functions = {tool.name: tool.parameters or {} for tool in tools}
    parser = ToolParser(dialect, functions)
    content, found = put_together(parser.push(pen.text) + parser.finish())
    assert found or not called
    if called:
        assert content == ("" if forced or dialect.bare else "Well, ")
    if not parallel:
        assert len(found) <= 1
    for name, arguments, complete in found:
        assert complete
        jsonschema.validate(json.loads(arguments), functions[name] or {"maxProperties": 0})


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=20, deadline=None)
@given(calls=CALLS, special=st.booleans())
def test_a_grammar_takes_what_its_models_write(folder, style, calls, special):
    """Any calls of tools whose schema says nothing, in the dialect's own form."""
    name, write = STYLES[style]
    if style in ODD or name in ("pythonic", "olmo3"):
        return
    dialect = BY_NAME[name]
    template = {"mistral args": "[ARGS]", "phi": "functools[", "deepseek v3": "```json"}.get(style)
    tokens, grammars = tokenizer(dialect, special, folder)
    one = [Call(call.name, {k: plain(v) for k, v in call.arguments.items()}) for call in calls]
    any_text = {key: {"type": "string"} for key in ("a", "city", "x_1", "name", "arguments")}
    schema = {"type": "object", "properties": any_text}
    tools = [Tool(name, schema) for name in sorted({call.name for call in calls})]
    single = name == "llama_json"
    spec = grammar_of(tools, dialect, template or "", tokens)
    ordered = [
        Call(c.name, {key: c.arguments[key] for key in any_text if key in c.arguments}) for c in one
    ]
    written = write(ordered[:1] if single else ordered)
    assert Pen(tokens, grammars.compile(spec).begin()).takes(written), written


STRICT = [
    ("qwen3_coder", {"properties": {"a": {"type": "string", "pattern": "x+"}}}, "'pattern'"),
    ("glm4_moe", {"properties": {"a": {"type": "string", "minLength": 2}}}, "'minLength'"),
    ("olmo3", {"properties": {}, "minProperties": 1}, "'minProperties'"),
    ("pythonic", {"properties": {"a-b": {}}}, "'a-b'"),
    ("qwen3_coder", {"properties": {"a b": {}}}, "'a b'"),
    ("pythonic", {"required": ["a"]}, "required"),
]


@pytest.mark.parametrize(("name", "schema", "says"), STRICT)
def test_what_a_form_of_calls_cannot_carry_is_refused_or_left_out(
    name: str, schema: dict[str, Any], says: str
) -> None:
    """A strict tool is obeyed in full or refused with the reason; names are never made up."""
    with pytest.raises(CannotForce, match=says):
        call_grammar(BY_NAME[name], "", [Tool("f", schema, strict=True)], {}, parallel=False)
    if says.startswith("'m") or says == "'pattern'":
        assert call_grammar(BY_NAME[name], "", [Tool("f", schema)], {}, parallel=False)


def test_a_tool_without_parameters_takes_none(folder: Path) -> None:
    """And one whose schema lists its properties takes no others, as long as it does not say so."""
    dialect = BY_NAME["hermes"]
    tokens, grammars = tokenizer(dialect, False, folder)
    listed = {"properties": {"a": {"type": "integer"}}}
    cases = [
        (None, "{}", True),
        (None, '{"b": 1}', False),
        (listed, '{"a": 1}', True),
        (listed, '{"b": 1}', False),
        (listed | {"additionalProperties": True}, '{"b": 1}', True),
        ({"type": "object"}, '{"b": 1}', True),
    ]
    for schema, arguments, wanted in cases:
        grammar = grammars.compile(grammar_of([Tool("f", schema)], dialect, "", tokens))
        text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
        assert Pen(tokens, grammar.begin()).takes(text) == wanted, (schema, arguments)


# Forms that are read, and not forced.
ODD = {
    "mistral", "arguments first", "arguments as text", "llama python_tag", "llama 4 json",
    "mistral ids", "granite text", "qwen coder bare",
}  # fmt: skip


def plain(value: Any) -> str:
    """A text that is neither broken off by a mark nor escaped in two ways."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(char for char in text if char.isalnum() or char in " .-") or "x"
