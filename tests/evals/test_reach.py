"""How many requests a change can touch, told by what is asked, before it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.design import Block, blocks_of_rows
from evals.item import Item
from evals.reach import of_rows
from evals.run import Source
from evals.scorers import score_recorded
from policies.hypothesis import Hypothesis
from policies.patching import Configured, patched
from policies.schema import Deployment
from tests.evals.simulated import hypothesis

CACHE = {"gateway.response_cache": {"tiers": ["standard"]}}
TRIM = {"gateway.trim": {"drop": "oldest", "budget_tokens": 64}}
POCKET = {"version": 1, "runtime": {"model": "pocket"}}


def changing(patch: Mapping[str, Any], **more: Any) -> Hypothesis:
    return hypothesis(kind_of_change="lossy_input", candidate={"patch": dict(patch)}, **more)


def sides(
    patch: Mapping[str, Any], policy: Mapping[str, Any] = POCKET
) -> tuple[Configured, Configured]:
    changed = patched(policy, patch)
    return (
        Configured(Path("base.yaml"), policy, Deployment.model_validate(policy)),
        Configured(Path("base.yaml"), changed, Deployment.model_validate(changed)),
    )


def source(texts: Sequence[str], asked: Hypothesis, name: str = "suite:qa", **body: Any) -> Source:
    items = [
        Item(f"q{n}", f"c{n}", 0, {"messages": [{"role": "user", "content": text}], **body})
        for n, text in enumerate(texts)
    ]
    blocks: tuple[Block, ...] = blocks_of_rows(name, items, asked.design, asked.stats)
    return Source(name, blocks, score_recorded)


def test_prompts_over_a_budget_are_counted_by_the_models_own_tokenizer() -> None:
    """Bytes would not do: 40 words of 80 bytes and more are fewer tokens than the budget."""
    asked = changing(TRIM)
    short, long = "a word and " * 8, "a word and " * 40
    (reach,) = of_rows(asked, sides(TRIM), [source([short] * 3 + [long] * 2, asked)])
    assert (reach.touched, reach.rows, reach.told) == (2, 5, "rows")
    again = changing(TRIM, design={"repeats": 3})
    (reach,) = of_rows(again, sides(TRIM), [source([short] * 3 + [long] * 2, again)])
    assert (reach.touched, reach.rows) == (2, 5)


def test_tools_and_their_outputs_are_part_of_a_prompt() -> None:
    asked = changing(TRIM)
    tools = [
        {"type": "function", "function": {"name": f"f{n}", "parameters": {}}} for n in range(9)
    ]
    (reach,) = of_rows(asked, sides(TRIM), [source(["hi"] * 3, asked, tools=tools)])
    assert reach.touched == 3


def test_questions_that_were_asked_before_are_counted_where_answers_are_kept() -> None:
    """Of the whole run, its warm-up too, where blocks are not cold; else of the same block."""
    texts = ["one", "two", "one", "one", "two", "three"]
    for design, most in (
        ({"cold_blocks": False, "warmup": 0, "block_items": 1}, 3),
        ({"cold_blocks": False, "warmup": 1, "block_items": 6}, 6),
        ({"cold_blocks": True, "block_items": 6}, 3),
        ({"cold_blocks": True, "block_items": 1}, 0),
    ):
        asked = changing(CACHE, design=design)
        (reach,) = of_rows(asked, sides(CACHE), [source(texts, asked)])
        assert reach.touched == most, design


def test_what_one_source_has_asked_is_known_in_the_next() -> None:
    asked = changing(CACHE, design={"cold_blocks": False, "warmup": 0})
    first, second = source(["one"], asked), source(["one", "two"], asked, "suite:more")
    found = of_rows(asked, sides(CACHE), [first, second])
    assert [(one.source, one.touched) for one in found] == [("suite:qa", 0), ("suite:more", 1)]


def test_what_only_a_run_can_tell_is_not_guessed() -> None:
    """Guesses that are right; servers that run already; a tokenizer that is not here."""
    guess = {"runtime.speculation": {"proposer": "ngram"}}
    asked = hypothesis(kind_of_change="lossless_distribution", candidate={"patch": guess})
    (reach,) = of_rows(asked, sides(guess), [source(["one"], asked)])
    assert (reach.touched, reach.share, reach.told) == (None, 1.0, "nobody")
    assert "the answers tell which have accepted_tokens; --from RUN" in str(reach)
    there = {"version": 1, "upstreams": [{"url": "http://127.0.0.1:9"}]}
    for patch, policy, why in (
        (TRIM, there, "the servers behind have"),
        (TRIM, {"version": 1, "runtime": {"model": "owner/name"}}, "the tokenizer of owner/name"),
        ({"gateway.trim.tool_output_chars": 99}, POCKET, "message by message"),
    ):
        asked = changing(patch)
        (reach,) = of_rows(asked, sides(patch, policy), [source(["one " * 99], asked)])
        assert reach.touched is None
        assert why in str(reach)
    asked = changing(CACHE)
    (reach,) = of_rows(asked, (None, None), [source(["one", "one"], asked)])
    assert "may have been asked before" in str(reach)


def test_a_change_that_touches_every_request_has_no_part_of_its_own() -> None:
    asked = hypothesis()
    assert of_rows(asked, sides({"runtime.weights": "w8a8"}), [source(["one"], asked)]) == ()
