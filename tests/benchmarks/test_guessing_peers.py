"""Engines that guess, side by side: what they are asked, and what is told of it."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.lab import models
from benchmarks.lab.engines import Engine, Ran, started
from benchmarks.lab.guessing_peers import Turn, engines, over_peers, tell, tokens_over_peers
from benchmarks.lab.peers.talk import Guess, guessing


def ran(seconds: float, *answers: list[int], **facts: float) -> Ran:
    return Ran(seconds, seconds, list(answers), facts)


def test_a_form_says_how_tokens_are_guessed():
    """Behind a plus; without one nothing is said of guesses, and `none` guesses nothing."""
    assert guessing("fp32") == ("fp32", None)
    assert guessing("generate/fp32+draft/5") == ("generate/fp32", Guess("draft", 5))
    assert guessing("f32+none/0") == ("f32", Guess("none", 0))


def test_every_engine_is_measured_with_and_without_guesses():
    """A speed-up is over the same engine without; names are told apart by their last word."""
    names = [engine.name for engine in engines()]
    assert len({*names}) == len(names)
    each = {name.rpartition(" ")[0] for name in names}
    assert all(f"{one} {way}" in names for one in each for way in ("none/0", "draft/5", "ngram/3"))


def test_the_prompt_is_taken_off_from_both_and_other_passes_are_what_guesses_cost():
    """Ten tokens of two answers in 5 s, 1 s of it for prompts; guessed, 3 s with one more for what
    the draft reads."""
    answers = [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]
    plain = Turn(ran(5.0, *answers, passes=10), ran(1.0, [1], [6]))
    guessed = Turn(ran(3.0, *answers, passes=4, drafted=12, accepted=6), None)
    by_passes = Turn(ran(4.0, *answers, passes=5, drafted=10), None)
    turns = {
        ("headgate torch", "none/0"): [plain],
        ("headgate torch", "draft/5"): [guessed],
        ("peer", "none/0"): [plain],
        ("peer", "draft/5"): [by_passes],
        ("gone", "draft/5"): [guessed],
    }
    told = tell(turns)
    assert told.keys() == {"headgate torch", "peer"}, "one without its plain way tells nothing"
    mine = told["headgate torch"]["draft/5"]
    assert mine["decode_speedup"] == (5 - 1) / (3 - 1)
    assert mine["decode_tok_cpu_s"] == 8 / 2
    assert mine["speedup"] == 5 / 3
    assert mine["tokens_a_pass"] == 10 / 4
    assert mine["acceptance"] == 6 / 12
    assert mine["equal"] == 1
    assert told["peer"]["draft/5"]["acceptance"] == 5 / 10
    told["headgate compiled"] = {"draft/5": {"decode_speedup": 1.0, "decode_tok_cpu_s": 12.0}}
    assert dict(over_peers(told)) == {"peer": pytest.approx(2 / (4 / 3))}
    assert tokens_over_peers(told) == pytest.approx(12 / (8 / 3))


def test_engines_guess_for_the_same_answers_one_after_another(tmp_path):
    """Ours and assisted generation, by this interpreter, with the target as its own draft: each
    prompt has its own number of tokens, and every guess is right."""
    model = models.make(models.TINY, tmp_path)
    for part in ("target", "draft"):
        shutil.copytree(model, tmp_path / "pair" / part)
    asked = [
        Engine(f"{name} {way}", program, f"{form}+{way}")
        for name, program, form in (
            ("ours", "ours_guessing", "torch"),
            ("hf", "hf", "generate/fp32"),
        )
        for way in ("none/0", "draft/3")
    ]
    failed: dict[str, str] = {}
    prompts, news = [list(range(300, 330)), list(range(400, 420))], [9, 5]
    with started(asked, tmp_path / "pair" / "target", 1, failed) as running:
        answers = {name: one.run(prompts, news, 1) for name, one in running.items()}
    assert not failed
    tokens = answers["ours none/0"].tokens
    assert [len(one) for one in tokens] == news
    assert all(one.tokens == tokens for one in answers.values())
    facts = answers["ours draft/3"].facts
    assert facts["accepted"] == facts["drafted"] > 0
    assert facts["passes"] < answers["ours none/0"].facts["passes"] == sum(news)
    assert answers["hf draft/3"].facts["passes"] < sum(news)
