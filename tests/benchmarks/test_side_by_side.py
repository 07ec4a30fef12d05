"""Loads, turns and ratios of engines side by side, with an engine that answers by a rule."""

from __future__ import annotations

import json

import pytest

from benchmarks import runtime_peers
from benchmarks.lab import models
from benchmarks.lab.engines import Engine, Ran, started
from benchmarks.lab.side_by_side import Load, Trial, compare, ratio, tell
from cache.tokens import Tokenizer

OURS = Engine("ours", "ours", "fp32")
HF = Engine("transformers", "hf", "generate/fp32")  # by this interpreter
GONE = Engine("gone", "vllm", "fp32", "nobody")
LOAD = Load("toy", 2, 20, 4)


def ran(seconds: float, *answers: list[int]) -> Ran:
    return Ran(seconds, seconds, list(answers), {})


def test_prompts_differ_from_round_to_round_and_come_again_with_the_same_round():
    """A prefix cache of an engine knows nothing of the next round, and a run can be repeated."""
    shared = Load("shared", 3, 24, 4, shared=16)
    assert shared.prompts(0, 1) == shared.prompts(0, 1)
    assert shared.prompts(0, 1)[0][:16] != shared.prompts(1, 1)[0][:16]
    assert shared.prompts(0, 1)[0][:16] != shared.prompts(0, 2)[0][:16]
    assert len({tuple(prompt[:16]) for prompt in shared.prompts(0, 1)}) == 1
    assert len({tuple(prompt) for prompt in shared.prompts(0, 1)}) == 3
    assert shared.ideal_prefill == 16 + 3 * 8


def test_a_ratio_is_the_median_of_paired_rounds():
    """A round in which the machine was busy slows both and moves no ratio."""
    rounds = {
        "ours": [ran(1.0, [1, 2]), ran(50.0, [1, 2]), ran(1.0, [1, 2])],
        "peer": [ran(2.0, [1, 2]), ran(100.0, [1, 2]), ran(3.0, [1, 2])],
    }
    assert ratio(rounds, "ours", "peer") == 2.0
    assert ratio(rounds, "ours", "absent") is None


def test_tokens_behind_the_first_difference_do_not_count_as_equal():
    """Two answers that part have different contexts from there on."""
    rounds = {"oracle": [ran(1.0, [1, 2, 3, 4])], "other": [ran(1.0, [1, 2, 9, 4])]}
    told = tell(rounds, rounds["oracle"])
    assert told["oracle"]["equal"] == 1.0
    assert told["other"]["equal"] == 0.5
    assert "equal" not in tell(rounds, [])["other"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return models.make(models.TINY, tmp_path_factory.mktemp("peers"))


def test_a_model_made_on_the_spot_is_the_same_every_time_and_has_a_tokenizer(tiny, tmp_path):
    """All of it comes from seeds, so that two machines measure the same model."""
    again = models.make(models.TINY, tmp_path)
    assert (tiny / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    tokenizer = Tokenizer.load(tiny)
    text = "Grüße, 42 ☕ tokens!"
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    assert tokenizer.vocab_size == models.TINY.vocabulary


def test_ours_equals_generate_token_for_token_in_processes_of_their_own(tiny):
    """Both are asked in the way of the benchmark; a peer without an environment says how to get
    one and keeps nobody else from running."""
    failed: dict[str, str] = {}
    trial = Trial(LOAD, 1, 2, (OURS.name, HF.name, GONE.name))
    with started([OURS, HF, GONE], tiny, 1, failed) as running:
        rounds = compare(trial, running, failed, lambda _: None)
    assert failed.keys() == {"gone"}
    assert "--setup nobody" in failed["gone"]
    assert rounds.keys() == {"ours", "transformers"}
    for mine, theirs in zip(rounds["ours"], rounds["transformers"], strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.answered == LOAD.count * LOAD.new
        assert mine.cpu_s > 0


def test_an_engine_that_dies_says_so_in_its_last_words(tiny):
    """What it printed is quoted, and the others go on."""
    failed: dict[str, str] = {}
    with started([Engine("broken", "to_gguf", "fp32")], tiny, 1, failed) as running:
        assert not running
    assert "gguf" in failed["broken"]


def test_setup_refuses_a_peer_that_it_does_not_know(capsys):
    """Nothing is made by mistake."""
    assert runtime_peers.main(["--setup", "nobody"]) == 2
    assert "llama-cpp" in capsys.readouterr().err


def test_a_goal_whose_engine_did_not_run_has_a_reason_instead_of_a_value(capsys):
    """A benchmark with one part alone tells the other goals apart from missed ones."""
    assert runtime_peers.main(["--quick", "--part", "stream", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["goals"] == []
    assert told["results"]["not_measured"].keys() == {g.name for g in runtime_peers.ABOUT.goals}
