"""What is said of formats: shares and their intervals, and distributions that are compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.lab import formats
from benchmarks.lab.formats import Speed, Variant
from benchmarks.quality import think, told_answers, told_speed
from pocket.tasks import TASKS, row
from policies.schema import Weights

POCKET = Path(__file__).parents[2] / "pocket" / "target"
ROWS = [row(task, "test", 0, 0) for task in TASKS[:3]]


@pytest.fixture(scope="module")
def models():
    eight = Weights(attention="w8a8", mlp="w8a8", head="w8a8")
    loaded = {
        "fp32": formats.load(POCKET, Variant(Weights())),
        "w8a8": formats.load(POCKET, Variant(eight)),
    }
    torch.set_num_threads(1)
    return loaded


def test_answers_are_told_by_what_changed_against_fp32():
    """A row that became wrong, one that became right, one that is wrong in another way."""
    rows = [row("answer", "test", 0, at) for at in range(4)]
    right = [one.answer for one in rows]
    base = [right[0], right[1], "no", "no"]
    told = told_answers([right[0], "no", right[2], "never"], base, rows)
    assert told["exact"] == {"answer": 0.5}
    answers = told["answers"]
    assert (answers["exact"], answers["flips"]) == (0.5, 0.75)
    assert (answers["gained"], answers["lost"], answers["p"]) == (1, 1, 1.0)
    assert answers["flips_low"] < 0.75 < answers["flips_high"]


def test_rows_in_one_step_are_thought_about_as_if_alone(models):
    """Each answer's distributions depend on its own prompt, wherever it stands in the step."""
    whole = [formats.given(models["fp32"], one) for one in ROWS]
    together = formats.logprobs(models["fp32"], whole)
    alone = torch.cat([formats.logprobs(models["fp32"], [one]) for one in whole])
    assert together.shape == (sum(len(one.answer) for one in whole), 4096)
    assert torch.allclose(together, alone, atol=1e-3)


def test_a_format_that_rounds_diverges_from_fp32_and_fp32_does_not(models):
    """The comparison has fp32 on one side and the format on the other."""
    told, tokens = think(models, ROWS)
    assert tokens > 0
    assert told["fp32"]["kl_millinats"]["max"] == 0.0
    found = told["w8a8"]["kl_millinats"]
    assert 0.0 < found["mean_low"] <= found["mean"] <= found["mean_high"] <= found["max"]
    assert told["fp32"]["perplexity"] >= 1.0


def test_the_model_answers_its_rows_greedily(models):
    """Texts come back in the order of the rows, cut at their natural end."""
    texts = formats.answers(models["fp32"], ROWS)
    assert sum(text == one.answer for text, one in zip(texts, ROWS, strict=True)) >= 2


def test_speed_is_compared_within_a_round():
    """A machine that halves its pace between rounds changes no ratio."""
    base = [Speed(100.0, 1.0), Speed(50.0, 1.0), Speed(100.0, 1.0)]
    told = told_speed([Speed(150.0, 1.0), Speed(75.0, 1.0), Speed(140.0, 3.0)], base)
    assert told["ratio"] == 1.5
    assert told["ratio_low"] == 1.4
    assert told["tokens_per_s"] == 140.0
