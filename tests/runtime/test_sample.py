"""Sampling follows the law that the request asks for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from runtime.draw import BLOCK, cut, draw, likelihoods
from runtime.sample import HEAD, cut_law, draw_by_tensors, law, sample, top_logprobs
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


def filter_by_tensors(logits: torch.Tensor, rows: list[Sampling]) -> list[list[float]]:
    """What the batch gives each row on a GPU, as probabilities by token id."""
    whole, _ = law(logits, rows)
    ordered, ids = cut_law(logits, rows)
    cut = torch.zeros_like(whole).scatter_(-1, ids, ordered)
    picked = [one.top_k > 0 or one.top_p < 1 for one in rows]
    probs = torch.where(torch.tensor(picked)[:, None], cut, whole).double()
    return (probs / probs.sum(-1, keepdim=True)).tolist()


def filter_by_rows(logits: torch.Tensor, rows: list[Sampling]) -> list[list[float]]:
    """What the batch gives each row on a CPU, as probabilities by token id."""
    probs = likelihoods(logits, rows).astype(np.float64)
    for row, one in enumerate(rows):
        if one.top_k > 0 or one.top_p < 1:
            ids, sums = cut(probs[row].astype(np.float32), one)
            probs[row] = 0
            probs[row, ids] = np.diff(sums, prepend=0.0)
    return (probs / probs.sum(-1, keepdims=True)).tolist()


both_ways = pytest.mark.parametrize("filtered", [filter_by_tensors, filter_by_rows])


@both_ways
@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(distinct_logits, samplings), min_size=1, max_size=5))
def test_filters_equal_the_plain_rule_for_any_mix_of_rows(filtered, rows):
    """The batched filters give each row what the rule gives it alone."""
    got = filtered(torch.tensor([row for row, _ in rows]), [one for _, one in rows])
    for probs, (row, one) in zip(got, rows, strict=True):
        assert probs == pytest.approx(plain_filter(row, one), abs=1e-6)


@both_ways
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
def test_a_large_vocabulary_is_cut_as_a_small_one(filtered, one, spread):
    """The shortcut over the most likely tokens equals sorting everything, flat or peaked."""
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(5)) * spread
    got = filtered(logits, [one] * 3)
    for probs, row in zip(got, logits.tolist(), strict=True):
        assert probs == pytest.approx(plain_filter(row, one), abs=1e-5)


@pytest.mark.parametrize("drawn", [draw_by_tensors, draw])
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
def test_drawn_tokens_follow_the_filtered_law(one, drawn):
    """Chi-square over 20,000 draws; a forbidden token is never drawn."""
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.3, -0.2, -1.0, -2.5]])
    expected = plain_filter(logits[0].tolist(), one)
    generator = torch.Generator().manual_seed(1)
    draws = 20_000
    uniforms = torch.rand(draws, generator=generator, dtype=torch.float64).tolist()
    tokens = drawn(logits.expand(draws, -1), [one] * draws, uniforms)
    counts = [tokens.count(token) for token in range(7)]
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    allowed = [(count, p * draws) for count, p in zip(counts, expected, strict=True) if p > 0]
    result = stats.chisquare([c for c, _ in allowed], [e for _, e in allowed])
    assert result.pvalue > 1e-4


@pytest.mark.parametrize("drawn", [draw_by_tensors, draw])
@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_give_possible_tokens(uniform, drawn):
    """A uniform number of 0 must not choose a forbidden first token, nor 1-eps a forbidden last."""
    logits = torch.tensor([[-9.0, 3.0, 2.0, -9.0]])
    one = Sampling(temperature=1.0, top_k=2)
    assert drawn(logits, [one], [uniform])[0] in (1, 2)
    masked = torch.full((1, 3 * BLOCK + 5), -math.inf)
    masked[0, 1] = masked[0, BLOCK + 3] = 0.0
    assert drawn(masked, [Sampling()], [uniform]) == [1 if uniform == 0 else BLOCK + 3]


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-6, 0.2, 1.0, 5.0]), min_size=1, max_size=300).filter(
        any
    ),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_draw_inverts_the_cumulative_distribution(weights, uniform):
    """The token whose step of the running sum holds the number; never one of weight 0."""
    sums = np.cumsum(weights)
    token = draw(torch.tensor([weights]).log(), [Sampling()], [uniform])[0]
    assert weights[token] > 0
    point = uniform * sums[-1]
    assert sums[token] - weights[token] - 1e-5 * sums[-1] <= point <= sums[token] + 1e-5 * sums[-1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), uniform=st.floats(0, 1, exclude_max=True))
def test_draws_from_the_heads_are_those_of_each_row_alone(seed, uniform):
    """Looking at all rows' likeliest tokens at once draws what cutting each row by itself draws."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 700, generator=generator) * 4
    ways = [Sampling(top_k=9), Sampling(top_p=0.8), Sampling(top_k=30, top_p=0.9, min_p=0.01)]
    samplings = [*ways, Sampling(top_p=0.999), Sampling(top_k=HEAD + 9, top_p=0.99), ways[1]]
    expected = []
    for row, one in zip(likelihoods(logits, samplings), samplings, strict=True):
        ids, sums = cut(row, one)
        expected.append(int(ids[sums.searchsorted(uniform * sums[-1], "right")]))
    assert draw(logits, samplings, [uniform] * 6) == expected


def test_of_equally_likely_tokens_no_more_than_asked_for_are_kept():
    """Ties at the border of top_k and of top_p do not let more in."""
    logits = torch.tensor([[1.0, 2.0] + [1.0] * 200])
    for one, count in ((Sampling(top_k=5), 5), (Sampling(top_k=5, top_p=0.5), 2)):
        for filtered in (filter_by_tensors, filter_by_rows):
            kept = [p > 0 for p in filtered(logits, [one])[0]]
            assert kept[1]
            assert sum(kept) == count


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
    for drawn in (draw_by_tensors, draw):
        together = drawn(logits, mixed, uniforms)
        alone = [drawn(logits[row : row + 1], [mixed[row]], [uniforms[row]])[0] for row in range(6)]
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
