"""Plans: what can be shown is known before anything is spent, and what cannot is refused."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from evals.design import blocks_of_rows, blocks_of_time
from evals.item import Item
from evals.needs import Noise, Supply, measured, supply_of
from evals.pairs import AA, BASELINE, by_arm, pair
from evals.plan import Plan, Row, plan
from evals.questions import questions
from evals.reach import assumed
from evals.stats import power
from evals.stats.power import min_pairs
from evals.strata import Reach
from policies.hypothesis import Design, Hypothesis, Stats, Validity
from tests.evals.simulated import CORRECT, FASTER, REPLAY, SUITE, TTFT, hypothesis, replayed, suite

PLENTY = {SUITE: Supply(10_000, 10_000, 500), REPLAY: Supply(10_000, 5_000, 500)}


def of_one(guardrail: dict[str, object], **more: object) -> Hypothesis:
    return hypothesis(claims=[], guardrails=[guardrail], **more)


def first(asked: Hypothesis, rows: int, noise: Noise | None = None, clusters: int = 0) -> Row:
    supply = Supply(rows, clusters or rows, rows // 20)
    name = questions(asked)[0].name
    return plan(asked, {SUITE: supply, REPLAY: supply}, {name: noise} if noise else None).rows[0]


@pytest.mark.parametrize(
    ("margin", "flips", "about"),
    [
        (0.02, 0.02, 310),
        (0.02, 0.06, 928),
        (0.02, 0.12, 1855),
        (0.01, 0.06, 3710),
        (0.05, 0.06, 149),
    ],
)
def test_pairs_follow_from_flips_and_margin(margin: float, flips: float, about: int) -> None:
    """The textbook's numbers, somewhat more where flips are few."""
    row = first(of_one({**CORRECT, "margin": margin}), 10_000, Noise(flips=flips))
    assert row.needed is not None and about <= row.needed <= 1.5 * about


def test_a_plan_that_cannot_pass_is_refused_with_what_can_be_tested() -> None:
    asked = of_one({**CORRECT, "margin": 0.01})
    known = Noise(flips=0.06)
    made = plan(asked, {SUITE: Supply(1000, 1000, 50)}, {plan(asked, PLENTY).rows[0].name: known})
    assert made.refused
    (row,) = made.rows
    assert row.needed is not None and row.needed > 1000
    assert row.testable is not None and 0.018 <= row.testable <= 0.025
    assert f"testable is {100 * row.testable:.3g} %" in made.table()
    enough = of_one({**CORRECT, "margin": row.testable})
    assert not plan(enough, {SUITE: Supply(1000, 1000, 50)}, {row.name: known}).refused


def test_a_bound_that_no_number_of_rows_can_show_is_told_as_such() -> None:
    """More bad answers than are allowed come without any change."""
    bad = {"suite": "qa", "metric": "bad_output", "test": "rate_max", "max": 0.01}
    row = first(of_one(bad), 100_000, Noise(rate=0.02))
    assert (row.enough, row.needed) == (False, None)
    assert row.testable is not None and 0.02 < row.testable < 0.03


def test_a_rate_without_events_takes_three_over_its_maximum() -> None:
    bad = {"suite": "qa", "metric": "bad_output", "test": "rate_max", "max": 0.002}
    row = first(of_one(bad), 1000)
    assert row.needed == pytest.approx(3 / 0.002, rel=0.01)
    assert row.testable == pytest.approx(0.003, abs=1e-9)


def test_what_hardly_ever_happens_is_not_planned_as_if_it_did() -> None:
    """Answers flip between right and wrong; whether a request is answered at all does not."""
    rails = [{"suite": "qa", "metric": name, "test": "paired_ni", "margin": 0.02}
             for name in ("correct", "served", "bad_output")]  # fmt: skip
    correct, served, bad = plan(hypothesis(claims=[], guardrails=rails), PLENTY).rows
    assert correct.needed is not None and served.needed is not None
    assert served.needed == bad.needed < correct.needed / 4
    assert "0.5% flips assumed" in served.note


def test_losses_are_planned_at_half_of_the_flips_until_they_are_counted() -> None:
    """That none would be lost is what nobody knows before a run."""
    lost = {"suite": "qa", "metric": "lost", "test": "rate_max", "max": 0.03}
    for flips, most in ((0.02, 1000), (0.05, 10_000)):
        row = first(of_one(lost, stats={"flips": flips}), 3000)
        assert row.needed is not None and 3 / 0.03 < row.needed < most
        assert f"rate {100 * flips / 2:.1f}% assumed" in row.note
    assert first(of_one(lost, stats={"flips": 0.06}), 10**6).needed is None
    assert first(of_one(lost), 3000, Noise(measured=True)).needed == min_pairs(0.03)


def test_each_of_many_guardrails_is_planned_for_all_of_them_to_pass() -> None:
    one, five = of_one(CORRECT), hypothesis(claims=[], guardrails=[CORRECT] * 5)
    assert (plan(one, PLENTY).power, plan(five, PLENTY).power) == pytest.approx((0.8, 0.96))
    alone, among = plan(one, PLENTY).rows[0].needed, plan(five, PLENTY).rows[0].needed
    assert alone is not None and among is not None and among > 1.4 * alone


def test_conversations_are_worth_less_than_as_many_rows() -> None:
    asked = of_one(CORRECT)
    alone, together = first(asked, 4000), first(asked, 4000, clusters=400)
    assert alone.needed is not None and together.needed is not None
    assert together.needed == pytest.approx(1.9 * alone.needed, rel=0.01)
    calm = first(asked, 4000, Noise(flips=0.0), clusters=400)
    assert calm.needed == math.ceil(59 * (1 + 9 * 0.5))  # no flip tells how flips would cluster
    few = first(asked, 4000, clusters=19)
    assert (few.enough, few.needed, few.testable) == (False, None, None)
    assert "19 clusters, and at least 20 are needed" in few.note


def test_times_need_pairs_of_blocks() -> None:
    quiet, loud = (first(of_one(TTFT), 400, Noise(spread=spread)) for spread in (0.05, 0.3))
    assert (quiet.what, quiet.needed, quiet.there, quiet.enough) == (
        "pairs of blocks",
        10,
        20,
        True,
    )
    assert loud.needed is not None and loud.needed > 50
    assert not loud.enough
    assert loud.testable is not None and loud.testable > 0.1


def test_too_few_blocks_are_refused_for_a_guardrail_and_warned_of_for_a_claim() -> None:
    """Of as many rows: ten pairs of blocks are the fewest that say anything of times."""
    asked = hypothesis(guardrails=[TTFT], claims=[{**FASTER, "replay": "week"}])
    for blocks, refused in ((5, True), (9, True), (40, False)):
        made = plan(asked, {REPLAY: Supply(1000, 1000, blocks)})
        rail, claim = made.rows
        assert (rail.enough, made.refused) == (not refused, refused)
        assert ("at least 10 are needed" in claim.note) == refused
        said = f"warning: claim 1 week tpot.p50 cannot be shown: {blocks} pairs of blocks, and at"
        assert any(one.startswith(said) for one in made.warnings) == refused
        assert ("design.block_items" in made.table()) == refused


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.floats(0.001, 3.0), st.floats(0.5, 0.99))
def test_few_blocks_and_any_spread_have_a_ratio_that_is_testable(
    blocks: int, spread: float, wanted: float
) -> None:
    """scipy's noncentral t gives up far out, and a plan of five blocks was a traceback."""
    ratio = 1 + power.testable_ratio(blocks, spread, power=wanted)
    assert math.isfinite(ratio)
    assert power.block_pairs_needed(spread, ratio * 1.001, power=wanted) <= blocks


def test_looking_all_the_time_takes_more() -> None:
    fixed = first(of_one(CORRECT), 4000).needed
    watched = first(of_one(CORRECT, stats={"mode": "sequential"}), 4000).needed
    assert fixed is not None and watched == pytest.approx(1.5 * fixed, rel=0.01)


def test_what_the_change_touches_is_planned_by_itself() -> None:
    """An eighth of the requests: eight times as many are needed, and 149 of them in any case: the
    fewest that could pass two points."""
    assert Validity().min_affected_pairs == min_pairs(0.02)
    trim = {
        "kind_of_change": "lossy_input",
        "candidate": {"patch": {"gateway.trim.budget_tokens": 9}},
    }
    supply = {SUITE: Supply(1000, 1000, 50)}
    made = plan(of_one(CORRECT, **trim), supply, reach=assumed({SUITE: 1000}, 0.125))
    whole, part = made.rows
    assert (whole.enough, part.enough, part.there) == (True, False, 125)
    assert made.refused
    assert plan(of_one(CORRECT), supply, reach=assumed({SUITE: 1000}, 0.125)).rows == (whole,)


def test_what_rows_say_of_a_change_refuses_only_what_could_not_pass_whatever_comes() -> None:
    """That 500 of 1,000 are touched at most is no reason not to look; that 148 are, or none, is."""
    trim = {
        "kind_of_change": "lossy_input",
        "candidate": {"patch": {"gateway.trim.budget_tokens": 9}},
    }
    asked = of_one({**CORRECT, "margin": 0.02}, **trim)
    supply = {SUITE: Supply(2000, 2000, 100)}
    for at_most, refused in ((500, False), (149, False), (148, True), (1, True), (0, True)):
        reach = Reach(SUITE, 2000, at_most, "rows", "long prompts")
        made = plan(asked, supply, reach=[reach])
        assert made.refused == refused, at_most
        assert f"touched in {reach}" in made.table()
    assert "refused: the change touches no request" in made.table()
    several = plan(asked, supply, reach=[Reach(SUITE, 2000, 500, "rows", "long prompts")])
    assert "at most 25% of the requests; fewer than planned for" in several.table()
    planned = plan(asked, supply, reach=[Reach(SUITE, 2000, 500, "asked", "")])
    assert planned.refused
    unknown = plan(asked, supply, reach=[Reach(SUITE, 2000, None, "nobody", "who knows")])
    assert not unknown.refused
    assert len(unknown.rows) == 1
    assert "not known before a run (who knows)" in unknown.table()


def test_what_a_source_has_is_counted_as_the_design_asks_it() -> None:
    """Repeats are further blocks of the same rows."""
    items = [Item(f"q{n}", f"c{n // 4}", n % 4, {}) for n in range(100)]
    design = Design(repeats=2, block_items=20)
    blocks = blocks_of_rows(SUITE, items, design, Stats())
    assert supply_of(blocks) == Supply(rows=100, clusters=25, blocks=10)


def test_a_quantile_of_few_requests_is_planned_with_more_spread() -> None:
    """Unmeasured: a block of a replay with 45 requests tells a p95 worse than its median, and both
    worse than a block of thousands; a suite's rows, asked one after another, are not meant."""
    items = [Item(f"q{n}", f"c{n}", 0, {}, meta={"t_s": n / 3}) for n in range(720)]
    blocks = blocks_of_time(REPLAY, items, Design(block=15), Stats())
    supply = supply_of(blocks)
    assert (supply.blocks, supply.crowd) == (16, 45)

    def needed(metric: str, there: Supply) -> int:
        rail = {**TTFT, "metric": metric, "margin": 0.15}
        row = plan(of_one(rail), {REPLAY: there}).rows[0]
        assert row.needed is not None
        return row.needed

    many = replace(supply, crowd=10_000)
    assert needed("ttft.p95", supply) > needed("ttft.p50", supply) > needed("ttft.p50", many)
    assert needed("ttft.p95", supply) > 16 >= needed("ttft.p95", many)
    assert needed("ttft.p95", many) == needed("ttft.p95", PLENTY[REPLAY])


def test_claims_are_never_a_reason_to_refuse() -> None:
    made = plan(hypothesis(guardrails=[CORRECT]), PLENTY)
    assert [one.required for one in made.rows] == [True, False]
    assert not made.refused


def test_a_source_without_rows_is_refused() -> None:
    assert plan(hypothesis(), {SUITE: PLENTY[SUITE]}).refused


def test_noise_is_taken_from_an_earlier_run() -> None:
    """Baseline against itself: flips, spread of blocks and of answers, how they cluster."""
    draw = random.Random(5)
    again = [
        replace(one, scores={"correct": 1.0 - one.scores["correct"]})
        if draw.random() < 0.1
        else one
        for one in suite(AA, 2000, a_cluster=4)
    ]
    rows = [*suite(BASELINE, 2000, a_cluster=4), *again, *replayed(BASELINE), *replayed(AA)]
    arms = by_arm(rows)
    length = {"replay": "week", "metric": "output_tokens", "test": "tost", "margin": 0.1}
    asked = hypothesis(guardrails=[CORRECT, TTFT, length])
    noise = measured(asked, pair(arms[BASELINE], arms[AA]))
    correct, ttft, tokens, _ = noise.values()
    assert correct.flips == pytest.approx(0.1, abs=0.02)
    assert correct.correlation < 0.15
    assert ttft.spread == pytest.approx(0.1 * 1.25 / 20**0.5 * 2**0.5, rel=0.5)
    assert tokens.spread == 0.0
    made = plan(asked, PLENTY, noise)
    assert "flips measured" in made.rows[0].note
    assert all("measured" in one.note for one in made.rows)


def test_flips_of_whole_conversations_are_measured_as_such() -> None:
    again = [
        replace(
            one, scores={"correct": float(int(one.cluster[1:]) % 5 > 0) * one.scores["correct"]}
        )
        for one in suite(AA, 2000, a_cluster=4)
    ]
    arms = by_arm([*suite(BASELINE, 2000, a_cluster=4), *again])
    (known, *_) = measured(of_one(CORRECT), pair(arms[BASELINE], arms[AA])).values()
    assert known.correlation > 0.6


@settings(max_examples=25, deadline=None)
@given(st.floats(0.005, 0.3), st.floats(0.001, 0.3), st.integers(200, 20_000))
def test_what_is_called_testable_is_planned_as_enough(
    margin: float, flips: float, rows: int
) -> None:
    row = first(of_one({**CORRECT, "margin": margin}), rows, Noise(flips=flips))
    assert row.enough == (row.needed is not None and row.needed <= rows)
    if row.testable is not None:
        assert first(of_one({**CORRECT, "margin": row.testable}), rows, Noise(flips=flips)).enough
        assert row.enough or row.testable > margin - 1e-3


def test_the_table_says_what_people_need_to_know() -> None:
    made: Plan = plan(hypothesis(), {SUITE: Supply(100, 100, 5), REPLAY: Supply(400, 200, 20)})
    said = made.table().splitlines()
    assert said[0].split() == ["bound", "needed", "there", "testable"]
    assert said[1].startswith("guardrail 1 qa correct paired_ni")
    assert said[-1].startswith("refused: guardrail 1 qa correct paired_ni cannot be shown: ")
    assert made.payload()["refused"] is True
