"""Scores, clusters, bets, ratios, divergence, drift: closed forms, scipy, simulation, algebra."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from evals.stats import divergence, drift, many, ratio
from evals.stats.betting import bets, betting
from evals.stats.estimate import TooFewClusters, freedom
from evals.stats.paired import cluster_t, cluster_tango, mean_diff
from evals.stats.sequential import EProcess, Matched, Sequential


def rng(seed=0):
    return np.random.default_rng(seed)


def of_pairs(lost, gained, n):
    return np.array([-1.0] * lost + [1.0] * gained + [0.0] * (n - lost - gained))


# ---- clusters ------------------------------------------------------------------------------------


def test_scores_on_their_own_give_the_t_test_unless_skewed():
    """Hall's correction only ever widens; without skewness and far values nothing is left of it."""
    once = rng(2).uniform(-0.4, 0.4, 40)
    diffs = np.concatenate([once, -once])
    estimate = cluster_t(diffs, None, -0.05)
    expected = stats.ttest_1samp(diffs, -0.05, alternative="greater")
    assert estimate.p == pytest.approx(expected.pvalue)
    assert estimate.low == pytest.approx(expected.confidence_interval(0.95).low)


def test_a_rare_great_loss_widens_the_low_end():
    """Skewed to the left, a mean that looks good says less than the t test believes."""
    diffs = np.concatenate([np.full(12, -0.6), rng(1).normal(0.02, 0.02, 188)])
    estimate = cluster_t(diffs, None, -0.05)
    plain = stats.ttest_1samp(diffs, -0.05, alternative="greater")
    assert estimate.p > plain.pvalue
    assert estimate.low < plain.confidence_interval(0.95).low


def test_few_conversations_that_lose_do_not_tell_how_bad_losses_are():
    """Gains everywhere and three losses in forty: the pass is bet on, the harm is not."""
    diffs = np.full(40, 0.05)
    diffs[:3] = -0.3
    estimate = cluster_t(diffs, None, -0.02)
    assert estimate.detail["bets"] == ["pass"]
    assert estimate.p == betting(diffs, -0.02).p > 0.05
    assert estimate.low == betting(diffs, -0.02).low
    assert estimate.high < betting(diffs, -0.02).high
    assert cluster_t(np.tile(diffs, 3), None, -0.02).detail["bets"] == []


def test_a_variance_that_few_clusters_make_up_has_few_degrees_of_freedom():
    """Close to clusters less one for a normal law, about two for each of few that differ much."""
    normal = rng(4).normal(0, 1, (1, 4000))
    assert float(freedom(normal)[0]) == pytest.approx(4000, rel=0.1)
    few = np.zeros((1, 1000))
    few[0, :4] = 1.0
    assert float(freedom(few)[0]) == pytest.approx(8, rel=0.02)
    assert float(freedom(np.zeros((1, 50)))[0]) > 0


def test_rows_of_one_conversation_count_once():
    """Each row ten times in its cluster says no more than each row once."""
    once = rng(3).normal(0, 0.2, 30)
    names = [f"c{number}" for number in np.repeat(np.arange(30), 10)]
    many_rows = cluster_t(np.repeat(once, 10), names, -0.05)
    assert (many_rows.n, many_rows.clusters) == (300, 30)
    assert many_rows.low == pytest.approx(cluster_t(once, None, -0.05).low)


def test_right_or_wrong_counts_each_conversation_once_too():
    """Ten equal rows a cluster: a design effect of ten, as many effective pairs as clusters."""
    values = np.repeat(of_pairs(20, 16, 120), 10)
    estimate = cluster_tango(values, np.repeat(np.arange(120), 10).tolist(), -0.02)
    assert estimate.detail["design_effect"] == pytest.approx(10, rel=0.02)
    assert estimate.detail["effective_pairs"] == pytest.approx(120, abs=2)


def test_rows_that_share_nothing_are_worth_all_of_them():
    values = rng(4).permutation(of_pairs(60, 55, 1200))
    estimate = cluster_tango(values, np.repeat(np.arange(240), 5).tolist(), -0.03)
    assert estimate.detail["effective_pairs"] > 900
    assert estimate.low == pytest.approx(mean_diff(values, -0.03).low, abs=0.004)


def test_few_clusters_with_a_flip_do_not_tell_how_flips_cluster():
    """Nothing lost in 100 conversations of nine turns: worth 180 pairs, not 900."""
    names = np.repeat(np.arange(100), 9).tolist()
    estimate = cluster_tango(np.zeros(900), names, -0.02)
    assert estimate.detail["correlation_assumed"]
    assert estimate.detail["effective_pairs"] == 180
    assert estimate.p <= 0.05
    assert mean_diff(np.zeros(540), -0.02, np.repeat(np.arange(60), 9).tolist()).p > 0.05


def test_few_clusters_that_differ_beyond_a_score_are_too_few():
    """Logarithms of ratios are no scores to bet on: nine that grew threefold say too little."""
    ratios = np.zeros(60)
    ratios[:9] = math.log(3)
    with pytest.raises(TooFewClusters, match="9 clusters that differ"):
        cluster_t(ratios, None, -0.1)
    ratios[9] = math.log(3)
    assert cluster_t(ratios, None, -0.1).method == "cluster_t"


@pytest.mark.parametrize("scores", [np.zeros(190), np.full(190, 0.3)])
def test_too_few_clusters_are_refused(scores):
    with pytest.raises(TooFewClusters, match="19 clusters, and at least 20"):
        mean_diff(scores, -0.02, [str(number % 19) for number in range(190)])


@pytest.mark.parametrize(
    ("diffs", "clusters", "method"),
    [
        (of_pairs(3, 2, 60), None, "tango"),
        (of_pairs(3, 2, 60), list(range(60)), "tango"),
        (of_pairs(3, 2, 60), [number // 3 for number in range(60)], "cluster_tango"),
        (rng().normal(0, 0.1, 60), None, "betting"),
        (rng().normal(0, 0.1, 160), None, "cluster_t"),
        (rng().normal(0, 0.1, 60), [number // 3 for number in range(60)], "cluster_t"),
        ([0.5] + [0.0] * 199, None, "betting"),
    ],
)
def test_the_test_follows_from_what_the_pairs_are(diffs, clusters, method):
    assert mean_diff(diffs, -0.05, clusters).method == method


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 1.0, 0.25, -0.5]), min_size=24, max_size=80),
    st.sampled_from([-0.1, -0.02, 0.0, 0.05]),
    st.sampled_from([1, 2, 4]),
)
def test_p_and_bounds_say_the_same_and_arms_mirror(diffs, margin, rows):
    """p <= alpha exactly where the bound clears the margin; swapped arms, swapped answers."""
    clusters = [number // rows for number in range(len(diffs))] if rows > 1 else None
    try:
        one = mean_diff(diffs, margin, clusters)
    except TooFewClusters:
        return
    other = mean_diff([-diff for diff in diffs], -margin, clusters)
    assert one.low == pytest.approx(-other.high, abs=1e-6)
    assert one.p == pytest.approx(other.p_harm, abs=1e-6)
    assert one.low <= one.estimate + 1e-9
    assert one.high >= one.estimate - 1e-9
    if abs(one.p - 0.05) > 1e-4:
        assert (one.p < 0.05) == (one.low > margin)
    if abs(one.p_harm - 0.05) > 1e-4:
        assert (one.p_harm < 0.05) == (one.high < margin)


# ---- bets ----------------------------------------------------------------------------------------


def test_wealth_is_what_the_bets_multiply_to():
    """Two pairs by hand: the mean over bets of both factors."""
    stakes = bets(-0.05)
    wealth = np.mean((1 + stakes * 0.05) * (1 + stakes * (-1 + 0.05)))
    assert betting([0.0, -1.0], -0.05).p == pytest.approx(min(1.0, 1 / wealth))


def test_a_bound_by_bets_is_where_the_wealth_is_one_over_alpha():
    diffs = rng(5).normal(0.1, 0.2, 80)
    estimate = betting(diffs, 0.0)
    assert betting(diffs, estimate.low).p == pytest.approx(0.05, rel=1e-3)
    assert betting(diffs, estimate.high).p_harm == pytest.approx(0.05, rel=1e-3)


def test_bets_hold_where_the_t_test_does_not():
    """One in fifty loses all, thirty pairs: t passes far too often, bets never too often."""
    draws = -(rng(6).random((600, 30)) < 0.02).astype(float)
    passed = np.mean([betting(row, -0.02).p <= 0.05 for row in draws])
    assert passed <= 0.05


def test_scores_out_of_range_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        betting([0.0, 1.5], -0.02)
    with pytest.raises(ValueError, match="at most 1"):
        EProcess(-0.02).update(1.5)


def test_one_after_another_gives_the_same_wealth_as_all_at_once():
    diffs = rng(7).choice([-1.0, 0.0, 1.0], 300, p=[0.03, 0.94, 0.03])
    process = EProcess(-0.02)
    for diff in diffs:
        process.update(diff)
    assert math.exp(-process.log_e) == pytest.approx(
        betting(diffs, -0.02).p if process.log_e > 0 else math.exp(-process.log_e)
    )
    assert process.best_log_e >= process.log_e
    assert process.count == 300


def test_a_rollout_that_restarts_goes_on_where_it_was():
    """State through JSON in the middle changes nothing."""
    diffs = rng(8).choice([-1.0, 0.0, 1.0], 400, p=[0.06, 0.92, 0.02])
    whole, half = EProcess(-0.02), EProcess(-0.02)
    for diff in diffs[:200]:
        whole.update(diff)
        half.update(diff)
    half = EProcess.of(json.loads(json.dumps(half.state())))
    for diff in diffs[200:]:
        whole.update(diff)
        half.update(diff)
    assert half.state() == whole.state()


def test_a_state_of_other_bets_is_refused():
    state = EProcess(-0.02).state()
    with pytest.raises(ValueError, match="begin anew"):
        EProcess.of(state | {"log_wealths": [0.0]})


def test_a_decision_stays():
    """A candidate that loses all is rolled back soon, and no later luck changes that."""
    watch = Sequential(-0.05)
    while watch.decision == "open":
        watch.update(-1.0)
    assert watch.decision == "fail"
    assert watch.count <= 10
    for _ in range(2000):
        watch.update(1.0)
    assert watch.decision == "fail"


def test_arms_that_are_not_paired_are_matched_within_strata():
    matched = Matched()
    assert matched.baseline("short", 1.0) is None
    assert matched.baseline("short", 0.0) is None
    assert matched.candidate("long", 1.0) is None
    assert matched.candidate("short", 1.0) == 0.5
    assert matched.candidate("short", 1.0) is None
    assert matched.baseline("short", 0.25) == 0.75
    assert matched.baseline("long", 0.0) == 1.0
    for _ in range(3 * Matched.WAITING):
        matched.candidate("new", 0.0)
    left = sum(matched.baseline("new", 1.0) is not None for _ in range(3 * Matched.WAITING))
    assert left == Matched.WAITING


# ---- ratios --------------------------------------------------------------------------------------


def test_a_ratio_of_blocks_is_the_t_test_of_logarithms():
    logs = rng(9).normal(0.02, 0.05, 12)
    estimate = ratio.block_t(logs, 1.10)
    expected = stats.ttest_1samp(logs, math.log(1.1), alternative="less")
    assert estimate.p == pytest.approx(expected.pvalue)
    assert estimate.high == pytest.approx(math.exp(expected.confidence_interval(0.95).high))
    assert estimate.estimate == pytest.approx(math.exp(logs.mean()))


def test_throughput_that_falls_is_latency_that_rises():
    logs = rng(10).normal(-0.02, 0.05, 12)
    rising, falling = ratio.block_t(logs, 1.1), ratio.block_t(-logs, 1 / 1.1, harm="fall")
    assert rising.p == pytest.approx(falling.p)
    assert rising.p_harm == pytest.approx(falling.p_harm)
    assert rising.high == pytest.approx(1 / falling.low)


def test_nine_block_pairs_are_too_few():
    with pytest.raises(TooFewClusters, match="9 block pairs, and at least 10"):
        ratio.block_t(np.zeros(9), 1.1)


def blocks(seed, pairs, requests, slower=1.0, drift=0.0):
    """Log-normal latencies; the machine's speed wanders from pair to pair."""
    draw = rng(seed)
    speed = np.exp(np.cumsum(draw.normal(0, drift, pairs)))
    before = [s * np.exp(draw.normal(0, 0.5, requests)) for s in speed]
    return before, [slower * s * np.exp(draw.normal(0, 0.5, requests)) for s in speed]


def test_a_slower_quantile_fails_and_an_equal_one_passes_despite_drift():
    for slower, passes in ((1.0, True), (1.25, False)):
        before, after = blocks(11, 16, 400, slower, drift=0.1)
        estimate = ratio.quantile_ratio(before, after, 0.95, 1.10, rng=rng(1))
        assert (estimate.p <= 0.05) is passes
        assert (estimate.p_harm <= 0.05) is not passes
        assert not estimate.detail["methods_disagree"]
        assert estimate.estimate == pytest.approx(slower, rel=0.06)


def test_the_bootstrap_draws_as_plain_resampling_does():
    """All resamples of a block at once, against one after the other: the same spread."""
    before, after = blocks(12, 10, 200)
    fast = ratio.bootstrap(before, after, 0.9, rng(2))
    draw, slow = rng(3), []
    for _ in range(400):
        logs = []
        for pair in draw.integers(0, 10, 10):
            drawn = draw.integers(0, 200, 200)
            a, b = (part[pair][drawn] for part in (after, before))
            logs.append(math.log(np.quantile(a, 0.9) / np.quantile(b, 0.9)))
        slow.append(np.mean(logs))
    assert fast.std() == pytest.approx(np.std(slow), rel=0.15)
    assert fast.mean() == pytest.approx(np.mean(slow), abs=0.25 * fast.std())


def test_requests_that_differ_among_them_hide_nothing_since_both_arms_have_the_same():
    """Lengths over a factor of fifty; arms that differ by a hundredth at each request."""
    draw = rng(5)
    own = [np.exp(draw.normal(0, 1, 20)) for _ in range(20)]
    before = [one * np.exp(draw.normal(0, 0.01, 20)) for one in own]
    after = [1.02 * one * np.exp(draw.normal(0, 0.01, 20)) for one in own]
    paired = ratio.quantile_ratio(before, after, 0.5, 1.10, rng=rng(6))
    assert 1.0 < paired.low < 1.02 < paired.high < 1.04
    apart = ratio.quantile_ratio(before, [one[:-1] for one in after], 0.5, 1.10, rng=rng(6))
    assert apart.high - apart.low > 5 * (paired.high - paired.low)


def test_methods_that_disagree_are_told_and_the_wider_bound_holds():
    before, after = blocks(13, 10, 60)
    estimate = ratio.quantile_ratio(before, after, 0.5, 1.10, rng=rng(4))
    edges = (estimate.detail["block_t_high"], estimate.detail["bootstrap_high"])
    between = sum(edges) / 2
    told = ratio.quantile_ratio(before, after, 0.5, between, rng=rng(4))
    assert told.high == max(edges)
    assert told.detail["methods_disagree"] is bool(edges[0] < between)
    assert told.p > 0.05


def test_equality_needs_both_sides():
    """Two one-sided t tests by scipy; a mean outside either side is no pass."""
    logs = rng(14).normal(0.01, 0.2, 200)
    estimate = ratio.tost(logs, 0.10)
    more = stats.ttest_1samp(logs, math.log(1.1), alternative="less").pvalue
    less = stats.ttest_1samp(logs, -math.log(1.1), alternative="greater").pvalue
    assert estimate.p == pytest.approx(max(more, less))
    for shift in (-0.3, 0.3):
        moved = ratio.tost(logs + shift, 0.10)
        assert moved.p > 0.9
        assert moved.p_harm < 0.01


def test_a_ratio_of_nothing_is_refused():
    with pytest.raises(ValueError, match="its cap"):
        ratio.log_ratios([1.0, 0.0], [1.0, 1.0])


# ---- many ----------------------------------------------------------------------------------------


def test_holm_is_the_stepdown_by_hand():
    assert many.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert many.holm([]) == []


# ---- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([], [], None),
    ],
)
def test_answers_part_at_the_first_token_that_differs(one, other, place):
    assert divergence.first_divergence(one, other) == place


def test_survival_counts_answers_that_ended_as_still_the_same():
    """Against scipy's product limit estimate."""
    tokens, diverged = [3, 5, 5, 8, 12, 20], [True, False, True, True, False, True]
    curve = divergence.kaplan_meier(tokens, diverged)
    events = [t for t, d in zip(tokens, diverged, strict=True) if d]
    ended = [t for t, d in zip(tokens, diverged, strict=True) if not d]
    known = stats.ecdf(stats.CensoredData(uncensored=events, right=ended)).sf
    assert curve.tokens == (0, 3, 5, 8, 20)
    assert curve.share[1:] == pytest.approx([float(known.evaluate(t)) for t in curve.tokens[1:]])
    assert all(
        low <= s <= high for low, s, high in zip(curve.low, curve.share, curve.high, strict=True)
    )


def test_where_the_baseline_wavers_the_candidate_may_as_much():
    control = rng(15).random(1000) < 0.1
    calm, wild = rng(16).random(1000) < 0.1, rng(17).random(1000) < 0.25
    assert divergence.divergence(calm, control, -0.05).p < 0.05
    assert divergence.divergence(wild, control, -0.05).p_harm < 0.05


def test_two_arms_of_one_law_are_told_apart_at_the_nominal_rate():
    """Permutation within prefixes: p is uniform where nothing differs, tiny where much does."""
    draw = rng(18)
    flagged = 0
    for _ in range(200):
        laws = draw.dirichlet(np.ones(6), 5)
        one, other = ([draw.choice(6, 30, p=law) for law in laws] for _ in range(2))
        flagged += divergence.same_law(one, other, draw, 99) <= 0.1
    assert 8 <= flagged <= 34
    laws = draw.dirichlet(np.ones(6), 5)
    other = [draw.choice(6, 60, p=np.roll(law, 1)) for law in laws]
    assert divergence.same_law([draw.choice(6, 60, p=law) for law in laws], other, draw, 199) < 0.05


def test_the_distance_of_laws_is_right_on_average_and_not_biased_by_few_draws():
    draw = rng(19)
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.4, 0.4, 0.2])
    apart = [[draw.choice(3, 8, p=law) for _ in range(4000)] for law in (p, q)]
    far = divergence.law_distance(*apart, maximum=0.2)
    assert far.estimate == pytest.approx(((p - q) ** 2).sum(), abs=0.01)
    same = [[draw.choice(3, 8, p=p) for _ in range(4000)] for _ in range(2)]
    near = divergence.law_distance(*same, maximum=0.02)
    assert near.estimate == pytest.approx(0, abs=0.01)
    assert near.p < 0.05


def test_draws_that_share_a_seed_make_no_laws_alike():
    """Both arms invert their laws at the same numbers: they agree more often than their laws do. A
    distance of the margin still passes at alpha; what one sampler draws twice differs in nothing.
    """
    draw = rng(20)
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.4, 0.4, 0.2])
    passed, far = 0, []
    for _ in range(200):
        numbers = draw.random((40, 12))
        one, other = (np.searchsorted(np.cumsum(law)[:2], numbers) for law in (p, q))
        found = divergence.law_distance(list(one), list(other), ((p - q) ** 2).sum())
        passed += found.p <= 0.05
        far.append(found.estimate)
    assert np.mean(far) == pytest.approx(((p - q) ** 2).sum(), abs=0.005)
    assert passed <= 20
    assert divergence.same_law(list(one), list(other), draw, 199) < 0.05
    assert divergence.same_law(list(one), list(one), draw, 199) == 1.0


def test_a_mean_that_must_be_small_has_its_upper_bound():
    values = rng(20).exponential(0.01, 300)
    estimate = divergence.mean_below(values, 0.02)
    assert estimate.p < 0.001
    assert estimate.low < estimate.estimate < estimate.high
    assert divergence.mean_below(values, 0.005).p_harm < 0.001


# ---- drift ---------------------------------------------------------------------------------------


def test_the_same_mix_does_not_move_and_another_does():
    draw = rng(21)
    old, new = draw.lognormal(5, 1, 4000), draw.lognormal(5, 1, 4000)
    assert drift.psi_of_numbers(old, new) < 3 * drift.noise(4000, 4000, 10)
    assert drift.psi_of_numbers(old, 2 * new) > drift.MOVED


def test_a_tenant_that_was_not_there_moves_the_mix():
    assert drift.psi_of_kinds("a" * 90 + "b" * 10, "a" * 90 + "b" * 10) == pytest.approx(0)
    assert drift.psi_of_kinds("a" * 90 + "b" * 10, "a" * 50 + "c" * 50) > drift.MOVED


def test_the_index_by_hand():
    expected = (60 - 40) / 100 * math.log(60 / 40) * 2
    assert drift.psi([399.5, 599.5], [599.5, 399.5]) == pytest.approx(expected, rel=1e-3)
