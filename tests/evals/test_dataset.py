"""Suites: YAML and rows become items; what is wrong with either is told with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.dataset import Suite, load_suite
from policies.load import load_suite_file
from policies.problems import PolicyError, every_field
from policies.suite import SuiteFile

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "evals" / "data"
HEAD = "apiVersion: headgate/v1\nkind: Suite\nname: one\ndata: rows.jsonl\n"
EXACT = "scorers: [{kind: exact}]\n"


def written(folder: Path, rows: list[Any], more: str = EXACT, raw: str | None = None) -> Path:
    text = raw if raw is not None else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)
    (folder / "suite.yaml").write_text(HEAD + more)
    return folder / "suite.yaml"


def loaded(folder: Path, rows: list[Any], more: str = EXACT) -> Suite:
    return load_suite(written(folder, rows, more))


def refused(folder: Path, rows: list[Any], more: str = EXACT, raw: str | None = None) -> str:
    with pytest.raises(PolicyError) as told:
        load_suite(written(folder, rows, more, raw))
    return str(told.value).replace(str(folder) + "/", "")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ---- what rows become ---------------------------------------------------------------------------


def test_a_prompt_is_a_question_of_a_chat(tmp_path: Path) -> None:
    suite = loaded(
        tmp_path,
        [{"id": "a", "prompt": "Hi?", "expected": "Hi!", "task": "greet", "tier": "batch"}],
        "system: Be brief.\nmax_tokens: 9\ntemperature: 0\nseed: 3\n" + EXACT,
    )
    (item,) = suite.items
    assert item.body == {
        "max_tokens": 9, "temperature": 0.0, "seed": 3,
        "messages": [{"role": "system", "content": "Be brief."}, user("Hi?")],
    }  # fmt: skip
    assert (item.id, item.cluster, item.turn, item.tier) == ("a", "a", 0, "batch")
    assert item.expected == "Hi!"
    assert item.meta["task"] == "greet"


def test_what_a_row_says_to_the_server_goes_before_the_suites_own(tmp_path: Path) -> None:
    row = {
        "id": 7, "messages": [{"role": "system", "content": "x"}, user("y")], "expected": "z",
        "max_tokens": 3, "tools": [{"type": "function"}], "stop": ["."],
    }  # fmt: skip
    (item,) = loaded(tmp_path, [row], "system: other\nmax_tokens: 9\n" + EXACT).items
    assert item.id == "7"
    assert item.body == {name: row[name] for name in ("messages", "max_tokens", "tools", "stop")}


def test_a_completion_is_asked_as_text(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "Once", "echo": True, "logprobs": 1}
    more = "ask: completion\nmax_tokens: 0\nscorers: [{kind: perplexity}]\n"
    (item,) = loaded(tmp_path, [row], more).items
    assert item.body == {"prompt": "Once", "max_tokens": 0, "echo": True, "logprobs": 1}


def test_turns_are_rows_of_one_conversation_behind_the_expected_answers(tmp_path: Path) -> None:
    turns = [{"user": "1?", "expected": "1"}, {"user": "2?", "expected": "2"}]
    first, second = loaded(tmp_path, [{"id": "c", "turns": turns}]).items
    assert (first.id, first.cluster, first.turn) == ("c#0", "c", 0)
    assert (second.id, second.cluster, second.turn, second.expected) == ("c#1", "c", 1, "2")
    assert first.body["messages"] == [user("1?")]
    assert second.body["messages"] == [user("1?"), said("1"), user("2?")]


def test_rows_may_be_packed(tmp_path: Path) -> None:
    import gzip

    path = written(tmp_path, [])
    packed = gzip.compress(b'{"id": "a", "prompt": "?", "expected": "!"}\n')
    (tmp_path / "rows.jsonl").write_bytes(packed)
    suite = load_suite(path)
    assert [item.id for item in suite.items] == ["a"]


# ---- what is refused ----------------------------------------------------------------------------


def test_an_unknown_scorer_is_told_with_what_was_meant(tmp_path: Path) -> None:
    told = refused(tmp_path, [], "scorers:\n- {kind: exakt}\n")
    assert told.startswith("suite.yaml:6:10  scorers[0].kind  expected 'exact', 'contains'")
    assert told.endswith("did you mean 'exact'?")


def test_a_suite_without_scorers_is_refused(tmp_path: Path) -> None:
    assert "scorers  expected at least 1 entries, got 0" in refused(tmp_path, [], "scorers: []\n")


def test_an_option_of_another_scorer_is_refused(tmp_path: Path) -> None:
    told = refused(tmp_path, [], "scorers:\n- {kind: exact, relative: 0.1}\n")
    assert "suite.yaml:6:27  scorers[0].relative  is an option of numeric or fields" in told


def test_two_scorers_of_one_name_are_refused(tmp_path: Path) -> None:
    told = refused(tmp_path, [], "scorers: [{kind: exact}, {kind: exact, field: other}]\n")
    assert "two scorers are called 'exact'" in told


def test_a_judge_without_a_model_and_a_pattern_that_is_none_are_refused(tmp_path: Path) -> None:
    assert "a judge needs `model`" in refused(
        tmp_path, [], "scorers: [{kind: judge, url: 'http://127.0.0.1:1'}]\n"
    )
    assert "is no regular expression" in refused(
        tmp_path, [], "scorers: [{kind: regex, pattern: '(a'}]\n"
    )


def test_ids_that_come_twice_are_told_with_both_lines(tmp_path: Path) -> None:
    rows = [{"id": one, "prompt": "?", "expected": "!"} for one in ("a", "b", "a")]
    told = refused(tmp_path, rows)
    assert (
        told == "rows.jsonl:3:1  id  'a' is on line 1 already; ids make the pairs of the two arms"
    )


def test_turns_of_one_conversation_need_a_common_cluster(tmp_path: Path) -> None:
    """Counted as independent they make every interval too short."""
    rows = [
        {"id": "a", "messages": [user("1?")], "expected": "1"},
        {"id": "b", "messages": [user("1?"), said("1"), user("2?")], "expected": "2"},
    ]
    told = refused(tmp_path, rows)
    assert told.startswith("rows.jsonl:2:1  cluster  goes on with the conversation of 'a' (line 1)")
    assert "give both rows the same `cluster`" in told
    assert len(loaded(tmp_path, [{**row, "cluster": "c"} for row in rows]).items) == 2


def test_a_turn_without_a_conversation_is_refused(tmp_path: Path) -> None:
    told = refused(tmp_path, [{"id": "a", "prompt": "?", "expected": "!", "turn": 2}])
    assert told.startswith("rows.jsonl:1:1  cluster  missing: a row that has a `turn`")


def test_a_row_that_lacks_the_cluster_is_refused_with_what_was_meant(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "?", "expected": "!", "conversation": "c"},
        {"id": "b", "prompt": "?", "expected": "!", "convresation": "c"},
    ]
    told = refused(tmp_path, rows, "cluster: conversation\n" + EXACT)
    assert told.startswith("rows.jsonl:2:1  conversation  missing")
    assert told.endswith("did you mean 'convresation'?")


def test_a_row_without_what_its_scorer_compares_with_is_refused(tmp_path: Path) -> None:
    told = refused(tmp_path, [{"id": "a", "prompt": "?", "expceted": "!"}])
    assert told.startswith("rows.jsonl:1:1  expected  missing: the scorer 'exact' compares with it")
    assert told.endswith("did you mean 'expceted'?")


def test_a_row_that_no_scorer_takes_is_refused(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "?", "expected": "!", "task": "b"}]
    told = refused(tmp_path, rows, "scorers: [{kind: exact, where: {task: a}}]\n")
    assert "no scorer takes this row" in told


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "?"}, "id  expected a name"),
        ({"id": "a"}, "expected one of `messages`, `prompt` and `turns`, got none"),
        ({"id": "a", "promt": "?"}, "did you mean 'promt'?"),
        ({"id": "a", "prompt": "?", "messages": []}, "got messages and prompt"),
        ({"id": "a", "messages": ["hi"]}, "messages  expected a list of messages"),
        ({"id": "a", "turns": [{"user": "a"}, {"user": "b"}]}, "turns[0].expected  expected a"),
        ({"id": "a", "turns": []}, "turns  expected a list"),
        ({"id": "a", "prompt": "?", "turn": -1, "cluster": "c"}, "turn  expected a number"),
        ([1], "expected a JSON object"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path: Path, row: Any, told: str) -> None:
    assert told in refused(tmp_path, [row])


def test_all_problems_are_told_up_to_twenty(tmp_path: Path) -> None:
    assert refused(tmp_path, [], raw="{\n" * 30).count("is not JSON") == 20


def test_no_rows_and_no_file_are_refused(tmp_path: Path) -> None:
    assert "has no row" in refused(tmp_path, [])
    path = written(tmp_path, [])
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(PolicyError, match="cannot be read: No such file"):
        load_suite(path)


def test_code_is_run_only_where_it_is_asked_for(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "?", "expected": "assert True"}]
    told = refused(tmp_path, rows, "scorers: [{kind: code}]\n")
    assert told.startswith("suite.yaml:5:18  scorers[0].kind  runs what the model wrote")
    assert load_suite(tmp_path / "suite.yaml", allow_code=True).items


@pytest.mark.parametrize(
    ("scorer", "expected", "told"),
    [
        ("{kind: numeric}", "none", "holds no number"),
        ("{kind: contains}", [], "is an empty list"),
        ("{kind: regex}", "(a", "is no regular expression"),
        ("{kind: json, json_schema: {type: objekt}}", "{}", "the JSON Schema is none"),
        (
            "{kind: instructions}",
            [{"id": "language:response_language", "language": "tlh"}],
            "languages that are told: ar, bg",
        ),
        ("{kind: choice}", "E", "is none of the choices A, B, C, D"),
        ("{kind: fields}", [1], "expected a mapping"),
        ("{kind: tool_calls}", ["f"], "expected calls such as"),
        (
            "{kind: instructions}",
            [{"id": "keywords:existance"}],
            "did you mean 'keywords:existence'",
        ),
    ],
)
def test_an_expectation_that_no_answer_can_meet_is_refused(
    tmp_path: Path, scorer: str, expected: Any, told: str
) -> None:
    rows = [{"id": "a", "prompt": "?", "expected": expected}]
    found = refused(tmp_path, rows, f"scorers: [{scorer}]\n")
    assert found.startswith("rows.jsonl:1:1  expected  ")
    assert told in found


# ---- what ships, and what is written about it ---------------------------------------------------


def test_shipped_suites_are_large_enough_for_a_margin_of_two_points() -> None:
    """268 pairs are the least that can pass it, 928 are needed where 6 % of answers flip."""
    sizes = {
        file.stem: (len(suite.items), len({item.cluster for item in suite.items}))
        for file in sorted(SHIPPED.glob("*.yaml"))
        if (suite := load_suite(file))
    }
    assert sizes == {
        "pocket": (1000, 1000), "pocket-chat": (960, 160), "pocket-text": (240, 240),
        "pocket-long": (952, 34),
    }  # fmt: skip


def test_shipped_rows_are_those_that_the_generator_makes() -> None:
    from pocket.suites import FILES, text_of

    for name in FILES:
        assert (SHIPPED / name).read_text(encoding="utf-8") == text_of(name), name


def test_every_field_has_its_line_in_the_documentation() -> None:
    page = (ROOT / "docs" / "suites.md").read_text()
    for path, field in every_field(SuiteFile):
        line = next((line for line in page.splitlines() if f"| `{path}` |" in line), None)
        assert line, f"{path} is not in docs/suites.md"
        assert field.description and field.description in line, f"{path} is described differently"


def test_the_examples_of_the_documentation_load(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "suites.md").read_text()
    examples = [one.partition("```")[0] for one in page.split("```yaml\n")[1:]]
    assert examples
    for example in examples:
        (tmp_path / "suite.yaml").write_text(example)
        load_suite_file(tmp_path / "suite.yaml")
