"""Right or wrong in both arms, rates, and what they need: against tables, scipy and enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evals.stats import power, rates, tango
from evals.stats.estimate import TooFewClusters


def every_table(n):
    """lost, gained: all that are possible with n pairs."""
    lost, gained = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = lost + gained <= n
    return lost[possible], gained[possible]


def multinomial(lost, gained, n, flips, diff):
    loss, gain = (flips - diff) / 2, (flips + diff) / 2
    rows = np.stack([lost, gained, n - lost - gained], axis=1)
    return stats.multinomial.pmf(rows, n, [loss, gain, 1 - flips])


def test_the_statistic_is_mcnemars_where_no_difference_is_asked_for():
    """At a margin of 0 Tango's z is (gained - lost) / sqrt(gained + lost)."""
    for lost, gained, n in ((6, 1, 40), (3, 9, 20), (44, 31, 500)):
        z = float(tango.statistic(lost, gained, n, 0.0))
        assert z == pytest.approx((gained - lost) / math.sqrt(gained + lost))


def test_the_statistic_uses_the_likeliest_table_of_the_hypothesis():
    """The closed form against a search for the largest likelihood at that difference."""
    lost, gained, n, diff = 6, 1, 40, -0.02
    shares = np.linspace(0.0201, 0.5, 200_001)
    likelihood = (
        lost * np.log(shares)
        + gained * np.log(shares + diff)
        + (n - lost - gained) * np.log(1 - 2 * shares - diff)
    )
    best = shares[np.argmax(likelihood)]
    expected = (gained - lost - n * diff) / math.sqrt(n * (2 * best + diff * (1 - diff)))
    assert float(tango.statistic(lost, gained, n, diff)) == pytest.approx(expected, abs=1e-4)


def test_p_is_the_largest_probability_of_a_table_as_extreme():
    """Fast region sums against plain enumeration of every table and many flip rates."""
    n, margin = 25, -0.1
    lost, gained = every_table(n)
    for table in ((0, 0), (1, 2), (4, 3)):
        z = float(tango.statistic(*table, n, margin))
        extreme = tango.statistic(lost, gained, n, margin) >= z - 1e-9
        worst = max(
            multinomial(lost[extreme], gained[extreme], n, flips, margin).sum()
            for flips in np.linspace(0.1, 1, 181)
        )
        assert tango.p_value(*table, n, margin) == pytest.approx(worst, abs=0.003)


@pytest.mark.parametrize("margin", [-0.05, -0.1])
def test_no_table_rate_lets_a_loss_of_the_margin_pass_more_often_than_alpha(margin):
    """Exact size, by enumeration, at every flip rate: at most 5 %."""
    for n in (30, 60, 120):
        lost, gained = every_table(n)
        passes = tango.statistic(lost, gained, n, margin) >= tango.critical(n, margin, 0.05)
        for flips in np.linspace(abs(margin), 1, 97):
            size = multinomial(lost[passes], gained[passes], n, flips, margin).sum()
            assert size <= 0.0505


def test_the_normal_score_interval_is_close_and_the_exact_one_no_narrower_at_its_low_end():
    """Tango 1998 by bisection of the statistic: the exact bound moves it by little."""
    for lost, gained, n in ((28, 28, 928), (6, 1, 40), (12, 30, 300)):
        estimate = tango.tango(lost, gained, n, -0.02)
        grid = np.linspace(-0.6, 0.6, 240_001)
        inside = np.abs([float(tango.statistic(lost, gained, n, d)) for d in grid[::20]]) < 1.6449
        assert estimate.low == pytest.approx(grid[::20][inside][0], abs=0.15 / math.sqrt(n))
        assert estimate.high == pytest.approx(grid[::20][inside][-1], abs=0.15 / math.sqrt(n))


def test_both_directions_mirror_each_other():
    """Swapping the arms turns the interval round."""
    one, other = tango.tango(9, 4, 200, -0.02), tango.tango(4, 9, 200, 0.02)
    assert one.low == pytest.approx(-other.high)
    assert one.high == pytest.approx(-other.low)
    assert one.p == pytest.approx(other.p_harm)


@pytest.mark.parametrize(("margin", "pairs"), [(0.01, 299), (0.02, 149), (0.05, 59)])
def test_the_fewest_pairs_that_can_pass_do_and_one_fewer_does_not(margin, pairs):
    """Without any flip: a bound that the normal approximation would claim at 268, 133, 52."""
    assert power.min_pairs(margin) == pairs
    assert tango.tango(0, 0, pairs, -margin).p <= 0.05
    assert tango.tango(0, 0, pairs, -margin).low > -margin
    assert tango.tango(0, 0, pairs - 1, -margin).p > 0.05
    assert tango.tango(0, 0, pairs - 1, -margin).low <= -margin


@pytest.mark.parametrize(("margin", "pairs"), [(0.01, 268), (0.02, 133), (0.05, 52)])
def test_the_normal_score_would_pass_with_fewer_pairs_too_often(margin, pairs):
    """At 133 pairs all losses and no gains at the margin pass in 6.8 %."""
    assert float(tango.statistic(0, 0, pairs, -margin)) >= 1.6449
    assert float(tango.statistic(0, 0, pairs - 1, -margin)) < 1.6449
    assert 0.065 < (1 - margin) ** pairs < 0.075
    assert tango.tango(0, 0, pairs, -margin).p == pytest.approx((1 - margin) ** pairs, rel=1e-3)


def test_forty_items_say_that_they_are_too_few():
    """Six lost and one gained of forty: neither two points lost at most, nor proven more."""
    estimate = tango.tango(6, 1, 40, -0.02)
    assert estimate.estimate == -0.125
    assert estimate.low == pytest.approx(-0.249, abs=0.002)
    assert estimate.high == pytest.approx(-0.011, abs=0.002)
    assert estimate.p > 0.05
    assert estimate.p_harm > 0.05


@pytest.mark.parametrize(("lost", "gained", "n"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_counts_that_cannot_be_are_refused(lost, gained, n):
    with pytest.raises(ValueError, match="pairs"):
        tango.tango(lost, gained, n, -0.02)


# ---- power ---------------------------------------------------------------------------------------


def test_the_textbook_rule_gives_the_known_numbers():
    """(z_a + z_b)^2 flips / margin^2, to compare with."""
    found = [[power.pairs_by_rule(f, m) for f in (0.02, 0.06, 0.12)] for m in (0.01, 0.02, 0.05)]
    assert found == [[1237, 3710, 7420], [310, 928, 1855], [50, 149, 297]]


@pytest.mark.parametrize("flips", [0.01, 0.02, 0.06, 0.12])
@pytest.mark.parametrize("margin", [0.02, 0.05])
def test_the_planned_pairs_have_the_planned_power(flips, margin):
    """By exact enumeration of what passes; the textbook's number falls short. Below 200 pairs one
    table more or less is worth many points, and the plan is on the safe side.
    """
    n = power.pairs_needed(flips, margin)
    z = tango.critical(n, -margin, 0.05)
    shown = tango.power(n, flips, 0.0, -margin, z)
    assert 0.79 <= shown <= (0.83 if n > 200 else 0.93)
    rule = power.pairs_by_rule(flips, margin)
    assert rule < n


def test_the_testable_margin_is_the_one_that_the_pairs_are_enough_for():
    margin = power.testable_margin(928, 0.06)
    z = tango.critical(928, -margin, 0.05)
    assert tango.power(928, 0.06, 0.0, -margin, z) == pytest.approx(0.8, abs=0.03)
    assert margin == pytest.approx(0.0206, abs=0.0003)
    assert power.testable_margin(1, 0.06) > 0.9


def test_more_guardrails_are_planned_with_more_power_each():
    assert power.guardrail_power(0.8, 5) == pytest.approx(0.96)


def test_block_pairs_for_a_ratio_have_their_power_by_simulation():
    count = power.block_pairs_needed(0.1, 1.1)
    rng = np.random.default_rng(1)
    logs = rng.normal(0, 0.1, (20_000, count))
    z = (logs.mean(1) - math.log(1.1)) / (logs.std(1, ddof=1) / math.sqrt(count))
    passed = (z < stats.t.ppf(0.05, count - 1)).mean()
    assert passed >= 0.79
    assert power.testable_ratio(count, 0.1) <= 0.1


@pytest.mark.parametrize("planned", [0.5, 0.8, 14 / 15, 0.99])
@pytest.mark.parametrize("spread", [0.001, 0.1, 3.0])
def test_every_number_of_block_pairs_has_a_ratio_that_it_can_test(planned, spread):
    """The noncentral t has no number far from the margin; a plan has one all the same."""
    found = [power.testable_ratio(count, spread, 0.05, planned) for count in (2, 10, 32, 300, 5000)]
    assert found == sorted(found, reverse=True)
    assert all(one > 0 for one in found)


# ---- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("events", "n"), [(0, 100), (3, 500), (50, 60), (7, 7)])
def test_bounds_of_a_rate_are_scipys(events, n):
    estimate = rates.clopper_pearson(events, n, 0.02)
    low, high = stats.binomtest(events, n).proportion_ci(0.9, method="exact")
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
    below = stats.binomtest(events, n, 0.02, alternative="less").pvalue
    above = stats.binomtest(events, n, 0.02, alternative="greater").pvalue
    assert (estimate.p, estimate.p_harm) == (pytest.approx(below), pytest.approx(above))


def test_none_of_n_leaves_three_in_n():
    assert rates.rule_of_three(1000) == pytest.approx(3 / 1000, rel=0.01)
    assert rates.clopper_pearson(0, 1000, 0.01).high == pytest.approx(rates.rule_of_three(1000))


def test_percentiles_are_proven_by_as_many_requests_as_loadgen_takes():
    """299 without a miss for a p99 at 95 % confidence, 459 at 99 %; each miss costs more."""
    assert rates.trials_needed(0.01, 0.05) == 299
    assert rates.trials_needed(0.01, 0.01) == 459
    assert rates.trials_needed(0.01, 0.05, events=1) == 473


def test_events_of_one_conversation_are_worth_fewer_trials():
    """The same forty events, spread over all conversations or within ten of them."""
    names = [number // 10 for number in range(1000)]
    spread, together = np.zeros(1000), np.zeros(1000)
    spread[::25] = 1
    together[[100 * number + place for number in range(10) for place in range(4)]] = 1
    apart = rates.cluster_rate(spread, names, 0.06)
    close = rates.cluster_rate(together, names, 0.06)
    assert apart.estimate == close.estimate == 0.04
    assert apart.p < 0.05 < close.p
    assert close.high > 1.2 * apart.high
    assert close.detail["design_effect"] > 2 > 1.2 > apart.detail["design_effect"]


def test_a_rate_of_events_on_their_own_is_clopper_and_pearsons():
    values = np.zeros(500)
    values[:3] = 1
    one = rates.cluster_rate(values, list(range(500)), 0.02)
    assert one == rates.clopper_pearson(3, 500, 0.02)
    repeats = rates.cluster_rate(values / 2, list(range(500)), 0.02)
    assert repeats.estimate == 0.003
    assert repeats.high < one.high


def test_no_event_in_a_hundred_conversations_is_no_proof_of_a_thousand_turns():
    """Where nothing happened the data do not tell how events cluster: worth 182 trials."""
    names = [number // 10 for number in range(1000)]
    none = rates.cluster_rate(np.zeros(1000), names, 0.01)
    assert none.detail["correlation_assumed"]
    assert none.detail["design_effect"] == 5.5
    assert none.high == pytest.approx(rates.rule_of_three(1000 / 5.5))
    with pytest.raises(TooFewClusters, match="10 clusters"):
        rates.cluster_rate(np.zeros(1000), [number // 100 for number in range(1000)], 0.01)
