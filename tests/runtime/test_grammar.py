"""Grammars allow exactly what they describe, token by token, and never hang on a hostile one."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from cache.tokens import Tokenizer
from runtime.grammar import Grammar, GrammarFailed, Grammars
from runtime.lark import GBNF_MAX, TEXT_MAX, GrammarRefused, GrammarSpec, json_rule

POCKET = Path(__file__).parents[2] / "pocket" / "target"
TOKENIZER = Tokenizer.load(POCKET)
VOCABULARY = TOKENIZER.vocab_size
GRAMMARS = Grammars(TOKENIZER, VOCABULARY)
END = min(TOKENIZER.eos_ids)


def begin(kind: str, text: str, **more: bool) -> Grammar:
    return GRAMMARS.compile(GrammarSpec(kind, text, **more)).begin()


def allowed(grammar: Grammar) -> list[int]:
    row = np.zeros(grammar.words, np.int32)
    grammar.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def takes(grammar: Grammar, text: str) -> bool:
    """Whether the grammar allows the text, spelled as the tokenizer spells it, and then an end."""
    for token in [*TOKENIZER.encode(text, special=False), END]:
        if token not in allowed(grammar):
            return False
        grammar.accept(token)
    return True


def write(grammar: Grammar, rng: random.Random, limit_tokens: int = 2000) -> str | None:
    """What a model without any preference writes, None when it did not come to an end.

    Of the allowed tokens it takes the shortest of a few, and an end where it may: otherwise its
    strings and numbers would never end.
    """
    tokens: list[int] = []
    while len(tokens) < limit_tokens:
        choices = allowed(grammar)
        assert choices, "a grammar that compiled came to a dead end"
        token = min(rng.choices(choices, k=3), key=lambda one: len(TOKENIZER.token_bytes(one)))
        if END in choices and rng.random() < 0.5:
            token = END
        grammar.accept(token)
        if token == END:
            return TOKENIZER.decode(tokens)
        tokens.append(token)
    return None


# ---- JSON schemas --------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=6)
leaves = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.just({"type": "number", "minimum": 0, "exclusiveMaximum": 10}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 6),
    ),
    st.builds(lambda values: {"enum": values}, st.lists(names, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, st.one_of(names, st.integers(-5, 5), st.booleans())),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-z]{1,4}-[0-9]{2}$"},
            {"type": "string", "format": "uuid"},
            {"type": "string", "format": "ipv4"},
        ]
    ),
)


def objects(values: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    def build(properties: dict, chosen: list[bool]) -> dict:
        required = [name for name, one in zip(properties, chosen, strict=False) if one]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    return st.builds(
        build,
        st.dictionaries(names, values, max_size=4),
        st.lists(st.booleans(), min_size=4, max_size=4),
    )


def arrays(values: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    return st.builds(
        lambda items, low, more: {
            "type": "array",
            "items": items,
            "minItems": low,
            "maxItems": low + more,
        },
        values,
        st.integers(0, 2),
        st.integers(0, 2),
    )


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_whatever_a_model_writes_under_a_schema_validates(schema, seed):
    """Random choices among the allowed tokens always end in a document of the schema."""
    grammar = begin("json_schema", json.dumps(schema))
    text = write(grammar, random.Random(seed))
    assume(text is not None)
    jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    ).validate(json.loads(text))


def test_without_a_schema_the_same_model_writes_no_json():
    """The property above says something: random tokens alone are hardly ever JSON."""
    rng = random.Random(1)
    for _ in range(20):
        text = TOKENIZER.decode([rng.randrange(3, VOCABULARY) for _ in range(12)])
        with pytest.raises(ValueError):
            json.loads(text)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(value=values)
def test_any_json_object_can_be_written_in_any_script(value):
    """Objects of any content pass an object's schema, compact or spread, in UTF-8."""
    for style in ({"indent": 2}, {"separators": (",", ":")}, {}):
        text = json.dumps({"value": value}, ensure_ascii=False, **style)
        assert takes(begin("json_schema", '{"type": "object"}'), text), text


def test_properties_come_in_the_order_of_the_schema():
    """The order that the schema gives is the order of the answer."""
    schema = {
        "type": "object",
        "properties": {"b": {"const": 1}, "a": {"const": 2}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    assert takes(begin("json_schema", json.dumps(schema)), '{"b": 1, "a": 2}')
    assert not takes(begin("json_schema", json.dumps(schema)), '{"a": 2, "b": 1}')


def test_whitespace_has_an_end():
    """Between values there is one blank at most, or one new line and its indentation."""
    schema = '{"type": "array", "items": {"const": 1}}'
    for blank, many in ((" ", "  "), ("\n", "\n\n"), ("\n" + " " * 20, "\n" + " " * 21)):
        assert takes(begin("json_schema", schema), f"[1,{blank}1]")
        assert not takes(begin("json_schema", schema), f"[1,{many}1]")


def test_keywords_that_cannot_be_enforced_are_refused_or_left_out():
    """A strict schema says which keyword is the trouble; a lenient one goes without it."""
    schema = '{"type": "array", "items": {"const": 1}, "uniqueItems": true}'
    with pytest.raises(GrammarRefused, match="uniqueItems"):
        begin("json_schema", schema)
    assert takes(begin("json_schema", schema, lenient=True), "[1, 1]")


# ---- regex, choice, grammar ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [r"[a-z]{2,5}", r"\d{3}-\d{4}", r"^(yes|no), (sir|madam)$", r"a/b\n\"'", r"[äöü日本]+"],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_regex_is_matched_as_a_whole(pattern, seed):
    """Whatever is written matches from start to end, also across characters of several bytes."""
    text = write(begin("regex", pattern), random.Random(seed))
    assert text is not None
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("choices", [["yes", "no"], ["a", "ab", "abc"], ['"', "\\", "\n", "日本"]])
def test_each_choice_and_nothing_else_can_be_written(choices):
    """Choices may begin alike, and may hold quotes, backslashes and any script."""
    text = json.dumps(choices)
    for choice in choices:
        assert takes(begin("choice", text), choice)
    assert not takes(begin("choice", text), choices[0] + choices[-1])
    assert {write(begin("choice", text), random.Random(seed)) for seed in range(30)} == {*choices}


LARK = 'start: expr\nexpr: NUM ("+" NUM)*\nNUM: /[0-9]{1,3}/\n'
GBNF = 'root ::= num ("+" num)*\nnum ::= [0-9] [0-9]? [0-9]?\n'


@pytest.mark.parametrize("text", [LARK, GBNF])
def test_a_grammar_may_be_lark_or_gbnf(text):
    """Both spell the same sums."""
    assert takes(begin("grammar", text), "12+345+6")
    assert not takes(begin("grammar", text), "12+")
    assert not takes(begin("grammar", text), "1234")


def test_a_call_of_a_tool_is_a_grammar_with_json_inside():
    """Tags around an object of a schema, and a special token by its id."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    schema["additionalProperties"] = False
    text = f'start: "<call>" {json_rule(schema)} "</call>"'
    assert takes(begin("grammar", text), '<call>{"city": "Rome"}</call>')
    assert not takes(begin("grammar", text), '<call>{"city": "Oslo"}</call>')
    special = min(TOKENIZER.special_ids - TOKENIZER.eos_ids)
    assert allowed(begin("grammar", f'start: <[{special}]> "a"')) == [special]


# ---- state ---------------------------------------------------------------------------------------


def test_the_end_is_the_only_token_once_nothing_else_may_follow():
    """An end is allowed where the answer is complete, and alone where it can only end."""
    grammar = begin("regex", "ab?")
    a, b = (TOKENIZER.encode(char, special=False)[0] for char in "ab")
    assert not grammar.may_end
    grammar.accept(a)
    assert allowed(grammar) == [END, b]
    assert grammar.may_end
    assert not grammar.is_terminated
    grammar.accept(b)
    assert allowed(grammar) == [END]
    assert grammar.is_terminated
    with pytest.raises(GrammarFailed, match="may not come here"):
        grammar.accept(a)


def test_an_end_that_comes_too_early_is_an_error():
    """The mask forbids it, and so does the grammar."""
    with pytest.raises(GrammarFailed, match="may not end"):
        begin("regex", "ab").accept(END)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_rollback_undoes_accepted_tokens(seed, data):
    """After going back, the masks are those of the first time, also from beyond the end."""
    schema = {"type": "array", "items": {"enum": ["x", "yy", 3]}, "maxItems": 4}
    grammar, rng = begin("json_schema", json.dumps(schema)), random.Random(seed)
    masks, ended = [allowed(grammar)], False
    while not ended and len(masks) < 40:
        token = rng.choice(masks[-1])
        grammar.accept(token)
        ended = token == END
        masks.append(allowed(grammar) if not ended else [])
    back = data.draw(st.integers(0, len(masks) - 1))
    grammar.rollback(back)
    if not (ended and back == 0):
        assert allowed(grammar) == masks[len(masks) - 1 - back]


def test_special_tokens_and_ids_without_a_token_are_never_allowed():
    """Text of any kind is written with text: no control token, no padding of the table."""
    wide = Grammars(TOKENIZER, VOCABULARY + 40)
    grammar = wide.compile(GrammarSpec("regex", r"(?s:.*)")).begin()
    row = np.zeros(grammar.words, np.int32)
    grammar.fill(row)
    free = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    assert max(free) < VOCABULARY
    assert TOKENIZER.special_ids.intersection(free) == TOKENIZER.eos_ids


def test_answers_of_one_grammar_do_not_wear_it_out():
    """Answers share a table of states; when it is full, the next answer gets a new one."""
    spec = GrammarSpec("regex", r"(.*[ab].{20}|.*[bc].{30}|.*[de].{40})+")
    for seed in range(6):
        grammar, rng = GRAMMARS.compile(spec).begin(), random.Random(seed)
        for _ in range(8):
            grammar.accept(rng.choice(allowed(grammar)[1:]))


def in_a_row(count: int, rule: str, last: str) -> str:
    """A grammar in which each rule leads to the next."""
    rules = [rule.format(this=f"r{at}", next=f"r{at + 1}") for at in range(count)]
    return "\n".join(["start: r0", *rules, f"r{count}: {last}"])


def references(count: int, hop: Callable[[dict], dict]) -> str:
    """A schema in which each definition leads to the next."""
    hops = {f"d{at}": hop({"$ref": f"#/$defs/d{at + 1}"}) for at in range(count)}
    return json.dumps({"$defs": {**hops, f"d{count}": {"const": 1}}, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("grammar", in_a_row(5000, "{this}: {next}", '"x"')),
        ("grammar", in_a_row(4000, '{this}: "a" {next}', '"x"')),
        ("json_schema", references(2000, lambda one: one)),
        ("json_schema", references(1000, lambda one: {"type": "array", "items": one})),
        ("json_schema", references(1000, lambda one: {"properties": {"a": one}})),
    ],
)
def test_a_grammar_of_thousands_of_steps_does_not_end_the_process(kind, text):
    """Compiling goes down each step by recursion; a stack that overflows is the end of all."""
    try:
        grammar = begin(kind, text)
    except GrammarRefused as error:
        assert str(error)
    else:
        assert allowed(grammar)


# ---- refusals ------------------------------------------------------------------------------------

HOSTILE = {
    "nested": "(" * 3000 + "a" + ")" * 3000,
    "alternatives": "|".join(["(.*a){20}b"] * 500),
}


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[1]", "must be an object"),
        ("json_schema", '{"a":' * 30_000, "characters"),
        ("json_schema", '{"a":' * 5000 + "1" + "}" * 5000, "nested"),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"not": {"type": "string"}}', "not"),
        ("json_schema", '{"$ref": "https://example.com/x.json"}', "example.com"),
        ("json_schema", '{"$ref": "#/$defs/none"}', "does not exist"),
        ("json_schema", '{"$ref": "#"}', "nothing"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ("regex", "(", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "", "empty"),
        ("regex", "a" * (TEXT_MAX + 1), "characters"),
        ("regex", "a*b*" * 4000, "one text or regex"),
        ("json_schema", json.dumps({"pattern": "a*b*" * 4000}), "one text or regex"),
        ("grammar", 'start: "a" /' + "a*b*" * 4000 + "/", "one text or regex"),
        ("regex", HOSTILE["nested"], "nest"),
        ("grammar", "start: a", "a"),
        ("grammar", 'start: start "a"', "nothing"),
        ("grammar", "no grammar at all", "neither Lark"),
        ("grammar", "root ::= " + "(" * 2000 + '"b"' + ")" * 2000, "nested"),
        ("grammar", 'root ::= "x"' + " " * GBNF_MAX, "GBNF"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_a_reason(kind, text, says):
    """Broken, unsupported, enormous and impossible grammars are told from each other."""
    with pytest.raises(GrammarRefused, match=re.escape(says)) as told:
        begin(kind, text)
    assert 0 < len(str(told.value)) < 500
    assert "llguidance" not in str(told.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", r"a{1000}{1000}"),
        ("regex", r"(?:a?){5000}a{5000}"),
        ("regex", r"((((a{1,100}){1,100}){1,100}){1,100}){1,100}"),
        ("regex", r"(.*[ab].{20}|.*[bc].{30}|.*[de].{40})+"),
        ("regex", HOSTILE["alternatives"]),
        (
            "json_schema",
            json.dumps({"properties": {f"p{n}": {"type": "string"} for n in range(2000)}}),
        ),
        ("grammar", '%llguidance {"no_forcing": false}\nstart: /a{1000}{1000}/'),
    ],
)
def test_a_hostile_grammar_is_refused_or_served_but_never_hangs(kind, text):
    """Every step is bounded by work, not by luck: the worst ones end in an error."""
    rng = random.Random(1)
    try:
        grammar = begin(kind, text)
        for _ in range(60):
            grammar.accept(rng.choice(allowed(grammar)))
            if grammar.is_terminated:
                break
    except (GrammarRefused, GrammarFailed) as error:
        assert str(error)
