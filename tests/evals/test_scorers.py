"""Scorers: what each counts as right, on answers as models write them."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from evals.dataset import Suite
from evals.item import Item
from evals.scorers import score, score_pairs, score_recorded
from evals.scorers.bad_output import looped, problem_with, refusal
from evals.scorers.instructions import CHECKS
from evals.scorers.languages import is_in
from evals.scorers.likelihood import divergence, perplexity
from evals.scorers.text import chosen, numbers
from policies.suite import Scorer
from telemetry import Observation

EVALS = Path(__file__).parents[3] / "shared" / "data" / "evals"
needs_evals = pytest.mark.skipif(not EVALS.exists(), reason="the shared eval files are not here")


def seen(text: str = "", **more: Any) -> Observation:
    return Observation("a", "suite:s", "candidate", "a", text=text, **more)


def call(name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": text}}


def item(expected: Any = None, body: Mapping[str, Any] | None = None, **meta: Any) -> Item:
    return Item("a", "a", 0, body or {"messages": []}, expected, meta=meta)


def scored(answer: Observation, row: Item, *scorers: dict[str, Any]) -> Mapping[str, float]:
    suite = Suite("s", (row,), tuple(Scorer(**one) for one in scorers))
    return asyncio.run(score(suite, row, answer))


def correct(text: str, expected: Any, kind: str, **options: Any) -> float:
    return scored(seen(text), item(expected), {"kind": kind, **options})["correct"]


# ---- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "options", "right"),
    [
        (" Ulm.\n", "Ulm.", {}, 1),
        (" Ulm.", "Ulm.", {"ignore": ()}, 0),
        ("ulm", "Ulm.", {}, 0),
        ("the ulm", "Ulm.", {"ignore": ("case", "punctuation", "articles", "space")}, 1),
        ("Bonn", ["Ulm", "Bonn"], {}, 1),
        ("I think so.</think>Ulm", "Ulm", {"after": "</think>"}, 1),
        ("Ulm", "Ulm", {"after": "</think>"}, 1),
        ("42", 42, {}, 1),
    ],
)
def test_exact(text: str, expected: Any, options: dict[str, Any], right: float) -> None:
    assert correct(text, expected, "exact", **options) == right


def test_contains_wants_all_or_tells_the_share() -> None:
    assert correct("Ulm and Bonn", ["Ulm", "Bonn"], "contains") == 1
    assert correct("Ulm", ["Ulm", "Bonn"], "contains") == 0
    assert correct("Ulm", ["Ulm", "Bonn"], "contains", all=False) == 0.5


def test_regex_compares_its_group_or_takes_the_rows_pattern() -> None:
    assert correct("Code: A-1. Code: B-2", "B-2", "regex", pattern=r"Code: (\S+)") == 1
    assert correct("Code: A-1 Code: B-2", "A-1", "regex", pattern=r"Code: (\S+)", which="first")
    assert correct("no code", "A-1", "regex", pattern=r"Code: (\S+)") == 0
    assert correct("parcel 17", r"parcel \d+$", "regex") == 1
    assert scored(seen("7"), item(), {"kind": "regex", "pattern": r"^\d$"})["correct"] == 1


@pytest.mark.parametrize(
    ("text", "expected", "options", "right"),
    [
        ("It costs 1,234.50 euros", 1234.5, {}, 1),
        ("2 + 3 = 5", "so 2 + 3 = 5\n#### 5", {}, 1),
        ("about 3.1", 3.14159, {"absolute": 0.05}, 1),
        ("about 3.1", 3.14159, {"relative": 0.001}, 0),
        ("-7", -7, {}, 1),
        ("parcel 21-7", 7, {}, 1),
        ("no idea", 7, {}, 0),
        ("5 of 9", 5, {"which": "first"}, 1),
        ("12%", 12, {}, 1),
        ("6.02e23", 6.02e23, {}, 1),
    ],
)
def test_numeric(text: str, expected: Any, options: dict[str, Any], right: float) -> None:
    assert correct(text, expected, "numeric", **options) == right


@given(st.floats(-1e9, 1e9, allow_nan=False), st.sampled_from(["", "so ", "= ", "("]))
def test_every_number_that_python_writes_is_read(number: float, before: str) -> None:
    assert numbers(f"{before}{number!r}") == [pytest.approx(number, abs=1e-12)]


def test_digits_that_end_a_sentence_are_a_number_of_their_own() -> None:
    assert numbers("First 3. Then 1, 2 and 10,000.") == [3, 1, 2, 10_000]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C) because", "C"),
        ("**D**", "D"),
        ("A. It is not B.", "A"),
        ("Not A. The answer is B", "B"),
        ("Answer: (C)", "C"),
        ("A cat could be B or C", None),
        ("It must be D, I think", "D"),
        ("none of them", None),
        ("", None),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    assert chosen(text, ("A", "B", "C", "D")) == letter


def test_f1_counts_words_as_squad_does() -> None:
    assert correct("The Broncos!", ["Denver Broncos", "Broncos"], "f1") == 1
    assert correct("Denver Broncos team", "Denver Broncos", "f1") == pytest.approx(0.8)
    assert correct("", "Ulm", "f1") == 0


# ---- JSON and calls -----------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def test_json_is_valid_by_the_scorers_schema_or_the_requests() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    row = item(body={"messages": [], "response_format": form})
    assert scored(seen('{"n": 1}'), row, {"kind": "json"})["correct"] == 1
    assert scored(seen('{"n": "1"}'), row, {"kind": "json"})["correct"] == 0
    assert scored(seen('{"n": "1"}'), item(), {"kind": "json"})["correct"] == 1
    fenced = seen('Here:\n```json\n{"n": 2}\n```')
    assert scored(fenced, item(), {"kind": "json", "json_schema": SCHEMA})["correct"] == 1
    assert scored(seen("{n: 1}"), item(), {"kind": "json"})["correct"] == 0


def test_fields_tell_the_share_that_is_right() -> None:
    expected = {"name": "Ada", "amount": 12.5, "at": {"city": "Ulm"}, "tags": ["a"]}
    answer = '{"name": "Ada ", "amount": 12.5000001, "at": {"city": "Bonn"}, "tags": ["a"]}'
    assert correct(answer, expected, "fields") == 0.75
    assert correct(answer, expected, "fields", keys=("name",)) == 1
    assert correct(answer, expected, "fields", keys=("at.city",)) == 0
    assert correct("not JSON", expected, "fields") == 0
    assert correct('{"name": true}', {"name": 1}, "fields") == 0


def test_tool_calls_match_in_any_order_and_no_call_is_left_over() -> None:
    expected = [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]
    one, two = call("f", {"a": 1}), call("f", {"a": 2})
    row = item(expected)
    rule = {"kind": "tool_calls"}
    assert scored(seen(tool_calls=(two, one)), row, rule)["correct"] == 1
    assert scored(seen(tool_calls=(one,)), row, rule)["correct"] == 0
    assert scored(seen(tool_calls=(one, two, two)), row, rule)["correct"] == 0
    assert scored(seen(tool_calls=(one, one)), row, rule)["correct"] == 0
    assert scored(seen(tool_calls=(one, call("f", "{"))), row, rule)["correct"] == 0
    assert scored(seen("I cannot", tool_calls=()), item([]), rule)["correct"] == 1


def test_tool_calls_take_what_bfcl_allows() -> None:
    expected = [{"geo.find": {"city": ["New York"], "unit": ["km", ""], "box": [{"w": [1, 2]}]}}]
    rule = {"kind": "tool_calls"}

    def right(arguments: dict[str, Any], name: str = "geo_find") -> float:
        return scored(seen(tool_calls=(call(name, arguments),)), item(expected), rule)["correct"]

    assert right({"city": "new york", "box": {"w": 2}}) == 1
    assert right({"city": "new york", "unit": "km", "box": {"w": 1}}) == 1
    assert right({"city": "new york", "box": {"w": 3}}) == 0
    assert right({"city": "new york", "unit": "mi", "box": {"w": 1}}) == 0
    assert right({"city": "new york"}) == 0
    assert right({"city": "new york", "box": {"w": 1}, "more": 1}) == 0
    assert right({"city": "new york", "box": {"w": 1}}, name="geo_seek") == 0


@needs_evals
@pytest.mark.parametrize("category", ["simple_python", "multiple", "parallel", "live_multiple"])
def test_bfcls_own_answers_are_right(category: str) -> None:
    """The first allowed value of every argument, for every row; another function's never are."""
    with gzip.open(EVALS / "bfcl" / f"{category}.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        truth = row["ground_truth"]
        calls = tuple(
            call(name.replace(".", "_"), {k: _first(v) for k, v in arguments.items() if v != [""]})
            for one in truth
            for name, arguments in one.items()
        )
        rule = {"kind": "tool_calls"}
        assert scored(seen(tool_calls=calls), item(truth), rule)["correct"] == 1, row["id"]
        wrong = (call("other", {}), *calls[1:])
        assert scored(seen(tool_calls=wrong), item(truth), rule)["correct"] == 0, row["id"]


def _first(allowed: list[Any]) -> Any:
    value = next((one for one in allowed if one != ""), allowed[0])
    if isinstance(value, dict):
        return {key: _first(values) for key, values in value.items() if values != [""]}
    if isinstance(value, list):
        return [_first([one]) if isinstance(one, dict) else one for one in value]
    return value


# ---- instructions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"),
    [
        ("punctuation:no_comma", {}, "a b", "a, b"),
        ("keywords:existence", {"keywords": ["dog"]}, "A dog.", "A dogma."),
        ("keywords:forbidden_words", {"forbidden_words": ["key"]}, "monkey", "The Key."),
        ("keywords:frequency", {"relation": "at least", "keyword": "ha", "frequency": 2}, "ha ha",
         "ha"),
        ("keywords:frequency", {"relation": "less than", "keyword": "ha", "frequency": 2}, "ha",
         "ha ha"),
        ("keywords:letter_frequency",
         {"let_relation": "at least", "letter": "j", "let_frequency": 2}, "Jj", "j"),
        ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3},
         "One. Two is 2.5!", "One. Two. Three."),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "a b c",
         "a b"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
        ("length_constraints:nth_paragraph_first_word",
         {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "it"}, "a\n\nIt is", "it\n\na"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**",
         "*a*"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a"),
        ("detectable_format:title", {}, "<<Ode>>\nx", "<< >>"),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
        ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
        ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2},
         "Part 1\na\nPart 2\nb", "Part 1\na"),
        ("detectable_content:number_placeholders", {"num_placeholders": 1}, "[name]", "name"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\nP.S. b", "a"),
        ("change_case:english_lowercase", {}, "abc", "Abc"),
        ("change_case:english_capital", {}, "ABC 1", "aBC"),
        ("change_case:capital_word_frequency",
         {"capital_relation": "less than", "capital_frequency": 2}, "A cat", "A CAT"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi.\nhi", "hi"),
        ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
        ("startend:quotation", {}, '"a"', '"a'),
        ("startend:end_checker", {"end_phrase": "Any more?"}, "x. Any more?", "Any more? x"),
        ("language:response_language", {"language": "bn"}, "আমি ভাত খাই", "I eat rice"),
    ],
)  # fmt: skip
def test_instructions(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert CHECKS[name](good, arguments)
    assert not CHECKS[name](bad, arguments)


def test_instructions_are_told_apart_by_their_share() -> None:
    row = item(
        instruction_id_list=["punctuation:no_comma", "change_case:english_lowercase"],
        kwargs=[{}, {}],
    )
    assert scored(seen("A b"), row, {"kind": "instructions"})["correct"] == 0
    assert scored(seen("A b"), row, {"kind": "instructions", "all": False})["correct"] == 0.5
    assert scored(seen("a b"), row, {"kind": "instructions"})["correct"] == 1


@needs_evals
def test_every_constraint_of_ifeval_is_checked() -> None:
    from evals.scorers.expectations import unmeetable

    with gzip.open(EVALS / "ifeval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rule = Scorer(kind="instructions")
    for row in rows:
        one = item(instruction_id_list=row["instruction_id_list"], kwargs=row["kwargs"])
        assert unmeetable(rule, one) is None, row["key"]


@needs_evals
def test_languages_are_told_apart() -> None:
    """Paragraphs of twelve languages, each taken for its own and for no other of the twelve."""
    path = EVALS.parent / "text" / "multilingual_xquad.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    languages = sorted({row["lang"] for row in rows})
    right = sum(
        [one for one in languages if is_in(one, row["context"])] == [row["lang"]] for row in rows
    )
    assert right / len(rows) > 0.98


# ---- likelihood ---------------------------------------------------------------------------------


def test_perplexity_and_kl() -> None:
    assert perplexity(seen(logprobs=(-1.0, -3.0))) == pytest.approx(7.389056)
    assert perplexity(seen()) is None
    assert divergence((-1.0, -2.0), (-1.0, -2.0)) == 0
    assert divergence((-1.0,), (-2.0,)) == pytest.approx(0.3678794)
    assert divergence((-1.0,), (-1.0, -2.0)) is None
    assert divergence((-1000.0,), (0.0,)) is not None


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1))
def test_kl_is_never_negative(both: list[tuple[float, float]]) -> None:
    apart = divergence([one for one, _ in both], [one for _, one in both])
    assert apart is not None
    assert apart >= 0


def test_kl_is_scored_where_both_arms_are_known() -> None:
    row = item()
    suite = Suite("s", (row,), (Scorer(kind="perplexity"), Scorer(kind="kl")))
    base = Observation("a", "suite:s", "baseline", "a", logprobs=(-1.0, -1.0))
    other = Observation("a", "suite:s", "candidate", "a", logprobs=(-1.0, -2.0))
    failed = Observation("a", "suite:s", "aa", "a", outcome="error")
    told = asyncio.run(score_pairs({"suite:s": suite}, (base, other, failed)))
    assert told[0].scores == {"kl": 0.0}
    assert told[1].scores == {"kl": pytest.approx(0.1839397)}
    assert told[2].scores == {}


# ---- bad output ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "body", "why"),
    [
        (seen("In Ulm."), {}, None),
        (seen(""), {}, "empty"),
        (seen(" \n"), {}, "empty"),
        (seen("", tool_calls=(call("f", {}),)), {}, None),
        (seen("", tool_calls=(call("f", "{"),)), {}, "invalid_json"),
        (seen("ok \ufffd\ufffd\x00"), {}, "unprintable"),
        (seen("naïve 東京 🎉 é\n\tok"), {}, None),
        (seen("The cat sat. " + "on the mat and " * 30), {}, "looped"),
        (seen("a" * 200), {}, "looped"),
        (seen("cut", finish_reason="length"), {}, "truncated"),
        (seen("cut", finish_reason="length"), {"max_tokens": 1}, None),
        (seen("{}x"), {"response_format": {"type": "json_object"}}, "invalid_json"),
        (seen('{"a": 1}'), {"response_format": {"type": "json_object"}}, None),
        (seen("I'm sorry, but I can't help with that."), {}, "refusal"),
        (seen("I can't stop laughing."), {}, None),
        (seen("", finish_reason="length"), {"max_tokens": 0}, None),
    ],
)
def test_bad_output(answer: Observation, body: dict[str, Any], why: str | None) -> None:
    assert problem_with(item(body={"messages": [], **body}), answer) == why


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("I\u2019m sorry, but I cannot assist with that request.", True),
        ("Sorry, I can't help with this.", True),
        ("As an AI language model, I am unable to provide that.", True),
        ("I cannot create such a list.", True),
        ("I'm sorry to hear that your lamp is broken. Send it back.", False),
        ("He said: I cannot help you.", False),
        ("Unfortunately the parcel is late.", False),
    ],
)
def test_refusals(text: str, is_one: bool) -> None:
    assert refusal(seen(text)) == is_one


@needs_evals
def test_text_that_people_wrote_is_no_loop() -> None:
    text = gzip.decompress((EVALS.parent / "text" / "war_and_peace.txt.gz").read_bytes()).decode()
    assert not any(looped(text[at : at + 3000]) for at in range(0, 600_000, 3000))


# ---- all of them --------------------------------------------------------------------------------


def test_a_failed_request_scores_nothing_and_never_goes_missing() -> None:
    rules = ({"kind": "exact"}, {"kind": "bad_output"}, {"kind": "refusal"}, {"kind": "perplexity"})
    told = scored(seen("Ulm", outcome="timeout"), item("Ulm"), *rules)
    assert told == {"exact": 0.0, "correct": 0.0, "bad_output": 1.0, "refusal": 0.0}


def test_the_first_scorer_that_takes_a_row_says_whether_it_is_correct() -> None:
    rules = ({"kind": "bad_output"}, {"kind": "f1", "where": {"task": "a"}}, {"kind": "exact"})
    told = scored(seen("Ulm now"), item("Ulm", task="a"), *rules)
    assert told == {"bad_output": 0, "f1": pytest.approx(2 / 3), "correct": told["f1"], "exact": 0}
    assert scored(seen("Ulm"), item("Ulm", task="b"), *rules)["correct"] == 1


def test_recorded_traffic_is_scored_without_a_suite() -> None:
    told = asyncio.run(score_recorded(item("In Ulm."), seen("In Ulm now.")))
    assert told == {"bad_output": 0.0, "refusal": 0.0, "f1": pytest.approx(0.8)}
    assert asyncio.run(score_recorded(item(), seen(outcome="error")))["bad_output"] == 1.0
