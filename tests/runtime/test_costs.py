"""Step costs: what the table says between its points, how it learns, what fits into a time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from runtime.calibrate import measure_costs
from runtime.costs import StepCosts, StepSize, pairs
from runtime.loading import load_model
from tests.runtime.tiny_models import FAMILIES, write_model

sizes = st.builds(
    StepSize,
    tokens=st.integers(1, 3000),
    decode_context=st.integers(0, 50_000),
    chunk_pairs=st.integers(0, 10**6),
    spans=st.integers(0, 64),
    guess_context=st.integers(0, 50_000),
)


def table() -> StepCosts:
    return StepCosts(
        [1, 8, 64, 512],
        [0.002, 0.003, 0.012, 0.090],
        decode_token_s=1e-7,
        chunk_pair_s=1e-8,
        span_s=3e-4,
        guess_token_s=5e-8,
    )


def test_between_its_points_a_table_is_a_line_and_beyond_them_it_goes_on():
    """A step of 36 tokens lies half way between 8 and 64; one of 1,024 costs twice 512."""
    costs = table()
    assert costs.estimate(StepSize(36)) == pytest.approx(0.0075)
    assert costs.estimate(StepSize(1024)) == pytest.approx(0.180)
    assert costs.estimate(StepSize(8, 1000, 2000)) == pytest.approx(0.003 + 1e-4 + 2e-5)
    assert costs.estimate(StepSize(8, 0, 0, 2, 400)) == pytest.approx(0.003 + 6e-4 + 2e-5)


@given(observed=st.lists(st.tuples(sizes, st.floats(1e-5, 10)), max_size=30), one=sizes)
def test_whatever_it_learned_more_work_never_costs_less(observed, one):
    """Single steps can take any time; the table stays positive and monotone."""
    costs = table()
    for size, seconds in observed:
        costs.observe(size, seconds)
    assert costs.estimate(one) > 0
    more = StepSize(
        one.tokens + 1,
        one.decode_context + 1,
        one.chunk_pairs + 1,
        one.spans + 1,
        one.guess_context + 1,
    )
    assert costs.estimate(more) >= costs.estimate(one)


@given(
    allowed=st.floats(1e-4, 1.0),
    beside=st.integers(0, 64),
    before=st.integers(0, 5000),
    most=st.integers(0, 4096),
)
def test_the_largest_chunk_fits_and_one_token_more_does_not(allowed, beside, before, most):
    """Halving finds the same chunk as trying them all."""
    costs, step = table(), StepSize(beside)

    def takes(count: int) -> float:
        return costs.estimate(StepSize(beside + count, 0, pairs(count, before)))

    found = costs.largest_chunk(allowed, step, before, most)
    assert 0 <= found <= most
    assert found == 0 or takes(found) <= allowed
    assert found == most or takes(found + 1) > allowed


@given(one=sizes, context=st.integers(0, 3000))
def test_steps_that_grow_cost_what_each_of_them_costs(one, context):
    """Token by token, over the points of the table and beyond them."""
    costs = table()
    for more, seconds in zip(range(40), costs.growing(one, context), strict=False):
        looked = one.guess_context + more * context
        step = replace(one, tokens=one.tokens + more, guess_context=looked)
        assert seconds == pytest.approx(costs.estimate(step))


def test_it_learns_what_steps_really_take():
    """From a table that is wrong by a factor, noisy steps of all sizes lead to the truth."""
    truth = StepCosts(
        [1, 8, 64, 512], [0.004, 0.008, 0.018, 0.200], decode_token_s=3e-7, chunk_pair_s=2e-8
    )
    costs, rng = table(), random.Random(0)
    for _ in range(3000):
        tokens = rng.choice([1, 4, 8, 20, 64, 200, 512])
        size = StepSize(tokens, rng.randrange(20_000), rng.randrange(200_000))
        costs.observe(size, truth.estimate(size) * rng.choice([0.95, 1.0, 1.05]))
    for tokens in (1, 8, 64, 512):
        size = StepSize(tokens, 10_000, 100_000)
        assert costs.estimate(size) == pytest.approx(truth.estimate(size), rel=0.2)


@pytest.mark.parametrize(
    ("sizes", "seconds"), [([], []), ([0, 1], [1, 1]), ([2, 1], [1, 1]), ([1], [0.0]), ([1], [])]
)
def test_a_table_that_means_nothing_is_refused(sizes, seconds):
    """Sizes ascend from one, times are positive and one for each size."""
    with pytest.raises(ValueError, match="cost table"):
        StepCosts(sizes, seconds)


def test_a_model_is_measured_within_its_limits_and_left_clean(tmp_path):
    """The table covers the sizes up to the budget, and the pool is as empty as before."""
    model, _ = load_model(write_model(tmp_path, *FAMILIES["llama"]), kv_tokens=256)
    costs = measure_costs(model, step_tokens=128, max_sequences=8, budget_s=20.0)
    assert costs.sizes == [1, 2, 4, 8, 16, 32, 64, 128]
    assert 0 < costs.seconds[0] <= costs.seconds[-1]
    assert not any(buffer.any() for buffer in model.read_blocks(range(model.blocks)))
