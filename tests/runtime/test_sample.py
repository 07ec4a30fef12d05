"""Sampling follows the law that the request asks for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from runtime.sample import HEAD, cut_law, law, sample, top_logprobs
from runtime.sequence import Sampling


def plain_filter(logits: list[float], one: Sampling) -> list[float]:
    """The documented rule, a token at a time: temperature, min_p, top_k, top_p."""
    highest = max(logits)
    weights = [math.exp((logit - highest) / one.temperature) for logit in logits]
    probs = [weight / sum(weights) for weight in weights]
    probs = [p if p >= one.min_p * max(probs) else 0.0 for p in probs]
    order = sorted(range(len(probs)), key=lambda at: (-probs[at], at))
    if one.top_k:
        for at in order[one.top_k :]:
            probs[at] = 0.0
    total, before = sum(probs), 0.0
    for rank, at in enumerate(order):
        p = probs[at]
        if rank > 0 and one.top_p < 1 and before >= one.top_p * total - 1e-12:
            probs[at] = 0.0
        before += p
    return [p / sum(probs) for p in probs]


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.1, 2.0),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.013]),
    top_k=st.sampled_from([0, 1, 2, 5, 100]),
    min_p=st.sampled_from([0.0, 0.05, 0.7, 1.0]),
)
distinct_logits = st.lists(st.integers(-60, 60), min_size=7, max_size=7, unique=True).map(
    lambda numbers: [number / 10 for number in numbers]
)


def batched_filter(logits: torch.Tensor, rows: list[Sampling]) -> list[list[float]]:
    """What the batch gives each row, as probabilities by token id."""
    whole, _ = law(logits, rows)
    ordered, ids = cut_law(logits, rows)
    cut = torch.zeros_like(whole).scatter_(-1, ids, ordered)
    picked = [one.top_k > 0 or one.top_p < 1 for one in rows]
    probs = torch.where(torch.tensor(picked)[:, None], cut, whole).double()
    return (probs / probs.sum(-1, keepdim=True)).tolist()


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(distinct_logits, samplings), min_size=1, max_size=5))
def test_filters_equal_the_plain_rule_for_any_mix_of_rows(rows):
    """The batched filters give each row what the rule gives it alone."""
    got = batched_filter(torch.tensor([row for row, _ in rows]), [one for _, one in rows])
    for probs, (row, one) in zip(got, rows, strict=True):
        assert probs == pytest.approx(plain_filter(row, one), abs=1e-6)


@pytest.mark.parametrize("spread", [0.02, 1.0, 8.0])
@pytest.mark.parametrize(
    "one",
    [
        Sampling(top_p=0.9),
        Sampling(top_p=0.999),
        Sampling(top_k=10),
        Sampling(top_k=HEAD + 40, top_p=0.95),
        Sampling(top_k=HEAD, top_p=0.5, min_p=0.01),
    ],
)
def test_a_large_vocabulary_is_cut_as_a_small_one(one, spread):
    """The shortcut over the most likely tokens equals sorting everything, flat or peaked."""
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(5)) * spread
    got = batched_filter(logits, [one] * 3)
    for probs, row in zip(got, logits.tolist(), strict=True):
        assert probs == pytest.approx(plain_filter(row, one), abs=1e-5)


@pytest.mark.parametrize(
    "one",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.7, top_k=4),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=1.3, top_p=0.9, top_k=5, min_p=0.02),
    ],
)
def test_drawn_tokens_follow_the_filtered_law(one):
    """Chi-square over 20,000 draws; a forbidden token is never drawn."""
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.3, -0.2, -1.0, -2.5]])
    expected = plain_filter(logits[0].tolist(), one)
    generator = torch.Generator().manual_seed(1)
    draws = 20_000
    uniforms = torch.rand(draws, generator=generator, dtype=torch.float64).tolist()
    tokens = sample(logits.expand(draws, -1), [one] * draws, uniforms)
    counts = [tokens.count(token) for token in range(7)]
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    allowed = [(count, p * draws) for count, p in zip(counts, expected, strict=True) if p > 0]
    result = stats.chisquare([c for c, _ in allowed], [e for _, e in allowed])
    assert result.pvalue > 1e-4


@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_give_possible_tokens(uniform):
    """A uniform number of 0 must not choose a forbidden first token, nor 1-eps a forbidden last."""
    logits = torch.tensor([[-9.0, 3.0, 2.0, -9.0]])
    one = Sampling(temperature=1.0, top_k=2)
    assert sample(logits, [one], [uniform])[0] in (1, 2)


def test_greedy_and_random_rows_share_a_batch():
    """A greedy row takes its argmax, whatever the random rows beside it draw."""
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 0.0, 9.0], [4.0, 0.0, 0.0]])
    mixed = [Sampling(temperature=0), Sampling(temperature=1.0), Sampling(temperature=0)]
    assert sample(logits, mixed, [None, 0.5, None]) == [1, 2, 0]


def test_a_rows_draw_does_not_depend_on_its_neighbours():
    """The same logits and the same uniform number give the same token in every batch."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 50, generator=generator)
    mixed = [Sampling(temperature=0.7 + row / 10, top_p=0.9 - row / 10) for row in range(6)]
    uniforms = torch.rand(6, generator=generator).tolist()
    together = sample(logits, mixed, uniforms)
    alone = [sample(logits[row : row + 1], [mixed[row]], [uniforms[row]])[0] for row in range(6)]
    assert together == alone


def test_logprobs_are_of_the_model_before_temperature():
    """Chosen and most likely tokens carry log-softmax of the raw logits."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.1, 0.2]])
    first, second = top_logprobs(logits, [2, 0], [2, None])
    assert second is None
    raw = logits[0].log_softmax(-1)
    assert first.chosen == pytest.approx(raw[2].item())
    assert first.ids == (1, 2)
    assert first.logprobs == pytest.approx((raw[1].item(), raw[2].item()))
