"""Parts of the traffic, all tests at once, other tests: what hides in the whole is found."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from evals.gate import judge_pairs
from evals.pairs import AA, BASELINE, CANDIDATE, by_arm, pair
from evals.verdict import Finding, Verdict
from telemetry import FROM_CACHE, Observation
from tests.evals.simulated import (
    CORRECT,
    SUITE,
    TTFT,
    failing,
    hypothesis,
    judged,
    observed,
    replayed,
    suite,
)

NO_ARMS = {"aa_control": False, "sabotage_control": False}
TRIM = {
    "kind_of_change": "lossy_input",
    "candidate": {"patch": {"gateway.trim": {"budget_tokens": 2000}}},
    "claims": [],
    "design": NO_ARMS,
}  # fmt: skip


def found(verdict: Verdict, metric: str, stratum: str = "all") -> Finding:
    return next(one for one in verdict.findings if (one.metric, one.stratum) == (metric, stratum))


def trimmed(rows: int, exposed: int, lost: int) -> list[Observation]:
    """The first `exposed` rows were trimmed in the candidate, which got the first `lost` wrong."""
    return [
        Observation(
            f"q{n:05}", SUITE, arm, f"q{n:05}",
            trimmed_tokens=500 if arm == CANDIDATE and n < exposed else 0,
            scores={"correct": float(arm == BASELINE or n >= lost)},
        )
        for arm in (BASELINE, CANDIDATE)
        for n in range(rows)
    ]  # fmt: skip


def test_a_drop_of_25_points_does_not_hide_behind_the_requests_that_were_not_touched() -> None:
    """At 8 % exposure it is two points overall, within a margin of three."""
    asked = hypothesis(**TRIM, guardrails=[{**CORRECT, "margin": 0.03}])
    verdict = judged(trimmed(rows=3000, exposed=240, lost=60), asked)
    assert found(verdict, "correct").decision == "pass"
    assert found(verdict, "correct").estimate == pytest.approx(-0.02)
    hidden = found(verdict, "correct", "affected")
    assert (hidden.decision, hidden.pairs, hidden.estimate) == ("fail", 240, pytest.approx(-0.25))
    assert verdict.decision == "fail"
    assert "[affected]: -25.00 points" in verdict.reasons[0]


def test_fewer_touched_requests_than_asked_for_are_inconclusive() -> None:
    """Nothing was lost, on 100 requests, which proves little about them."""
    asked = hypothesis(**TRIM, guardrails=[{**CORRECT, "margin": 0.03}])
    verdict = judged(trimmed(rows=3000, exposed=100, lost=0), asked)
    assert (verdict.decision, verdict.reason) == ("inconclusive", "underpowered")
    assert found(verdict, "correct", "affected").pairs_needed == 149
    few = {**TRIM, "validity": {"min_affected_pairs": 100}}
    asked = hypothesis(**few, guardrails=[{**CORRECT, "margin": 0.03}])
    verdict = judged(trimmed(rows=3000, exposed=100, lost=0), asked)
    assert verdict.decision == "pass"


def cached(rows: int, hits: int, lost: int) -> list[Observation]:
    """The candidate answered the first `hits` rows from its cache, and the first `lost` wrong."""
    return [
        replace(one, trimmed_tokens=None, replica=FROM_CACHE if one.trimmed_tokens else "one:1")
        for one in trimmed(rows, hits, lost)
    ]


def test_what_the_response_cache_answered_is_judged_by_itself() -> None:
    """Answers that were given again are wrong in a tenth: two points of all, and ten of these."""
    wanted = {
        "candidate": {"patch": {"gateway.response_cache": {"tiers": ["batch"]}}},
        "kind_of_change": "lossy_input",
        "activation": [{"metric": "cached_answers", "min": 149}],
        "claims": [],
        "design": NO_ARMS,
    }
    asked = hypothesis(**wanted, guardrails=[{**CORRECT, "margin": 0.03}])
    verdict = judged(cached(rows=2000, hits=400, lost=40), asked)
    assert found(verdict, "correct").decision == "pass"
    hidden = found(verdict, "correct", "affected")
    assert (hidden.decision, hidden.pairs, hidden.estimate) == ("fail", 400, pytest.approx(-0.1))
    assert verdict.decision == "fail"
    fine = judged(cached(rows=2000, hits=400, lost=0), asked)
    assert (fine.decision, fine.controls[3].detail["exposed"]) == ("pass", 400)
    seldom = judged(cached(rows=2000, hits=100, lost=0), asked)
    assert (seldom.decision, seldom.reason) == ("invalid", "not_activated")
    assert "cached_answers rose by 100 where 149 prove that it ran" in seldom.reasons[0]


def test_a_trim_that_touched_nothing_is_not_activated() -> None:
    asked = hypothesis(**TRIM, guardrails=[CORRECT])
    verdict = judged(trimmed(rows=400, exposed=0, lost=0), asked)
    assert (verdict.decision, verdict.reason) == ("invalid", "not_activated")
    assert "no request of the candidate was touched" in verdict.reasons[0]


def test_a_change_that_touches_all_has_no_part_of_its_own() -> None:
    asked = hypothesis(**TRIM, guardrails=[CORRECT])
    verdict = judged(trimmed(rows=400, exposed=400, lost=0), asked)
    assert [one.stratum for one in verdict.findings] == ["all"]
    assert verdict.decision == "pass"


def by_tier(slower: float) -> list[Observation]:
    """A candidate whose batch tier, a quarter of the traffic, is that much slower."""
    return [
        replace(one, ttft_s=one.ttft_s * slower)
        if one.arm == CANDIDATE and one.tier == "batch" and one.ttft_s is not None
        else one
        for arm in (BASELINE, CANDIDATE)
        for one in replayed(arm)
    ]


def test_a_part_that_is_proven_worse_fails_though_the_whole_holds() -> None:
    asked = hypothesis(claims=[], design=NO_ARMS, guardrails=[{**TTFT, "strata": ["tier"]}])
    verdict = judged(by_tier(1.5), asked)
    assert found(verdict, "ttft.p50", "tier=batch").decision == "fail"
    assert found(verdict, "ttft.p50", "tier=interactive").decision == "pass"
    assert verdict.decision == "fail"


def test_a_part_of_which_little_is_known_does_not_hold_up_the_whole() -> None:
    """Strata that the file names can fail a candidate; that they pass is not asked."""
    rows = [one for one in by_tier(1.0) if one.tier != "batch" or one.block < 5]
    asked = hypothesis(claims=[], design=NO_ARMS, guardrails=[{**TTFT, "strata": ["tier"]}])
    verdict = judged(rows, asked)
    few = found(verdict, "ttft.p50", "tier=batch")
    assert (few.decision, few.reason) == ("inconclusive", "too_few_clusters")
    assert verdict.decision == "pass"


def test_prompts_fall_into_buckets_by_their_length_in_the_baseline() -> None:
    rows = [one for arm in (BASELINE, CANDIDATE) for one in replayed(arm)]
    asked = hypothesis(claims=[], guardrails=[{**TTFT, "strata": ["prompt_bucket", "turn"]}])
    names = {one.stratum for one in judged(rows, asked).findings}
    assert names == {"all", "prompt_bucket=<256", "prompt_bucket=<1024"}


def test_many_guardrails_do_not_fail_an_innocent_candidate_by_chance() -> None:
    """What one test alone would call proven harm, at 4 %, is none among ten."""

    def scores(one: Observation) -> dict[str, float]:
        lost = one.arm == CANDIDATE and int(one.id[1:]) < 26
        return {"s0": float(not lost), **{f"s{n}": 1.0 for n in range(1, 10)}}

    loss = [replace(one, scores=scores(one)) for one in [*suite(BASELINE), *suite(CANDIDATE)]]
    rails = [{**CORRECT, "metric": f"s{n}", "margin": 0.04} for n in range(10)]
    alone = judged(loss, hypothesis(claims=[], design=NO_ARMS, guardrails=rails[:1]))
    assert alone.decision == "fail"
    assert 0.005 < alone.findings[0].detail["p_harm"] < 0.05
    among = judged(loss, hypothesis(claims=[], design=NO_ARMS, guardrails=rails))
    assert among.decision == "inconclusive"
    assert among.findings[0].detail["p_harm_holm"] == pytest.approx(
        10 * among.findings[0].detail["p_harm"]
    )


# ---- other tests --------------------------------------------------------------------------------


def test_flips_are_counted_though_gains_make_up_for_them() -> None:
    """Five points lost and five gained are no difference, and are no less five points lost."""
    rows = [
        replace(one, scores={"correct": float(int(one.id[1:]) % 20 != (arm == CANDIDATE))})
        for arm in (BASELINE, CANDIDATE)
        for one in suite(arm)
    ]
    lost = {"suite": "qa", "metric": "lost", "test": "rate_max", "max": 0.02}
    verdict = judged(rows, hypothesis(claims=[], design=NO_ARMS, guardrails=[CORRECT, lost]))
    assert found(verdict, "correct").decision == "pass"
    flips = found(verdict, "lost")
    assert (flips.decision, flips.lost, flips.gained) == ("fail", 20, 20)


def test_a_rate_that_never_happened_is_bounded_by_its_number_of_trials() -> None:
    bad = {"suite": "qa", "metric": "bad_output", "test": "rate_max", "max": 0.01}
    asked = hypothesis(claims=[], design=NO_ARMS, guardrails=[bad])
    for rows, decision in ((400, "pass"), (250, "inconclusive")):
        seen = [one for arm in (BASELINE, CANDIDATE) for one in suite(arm, rows)]
        rate = found(judged(seen, asked), "bad_output")
        assert (rate.decision, rate.estimate) == (decision, 0.0)
        assert rate.high == pytest.approx(3 / rows, rel=0.01)


def test_a_percentile_is_proven_by_requests_that_were_in_time() -> None:
    """As in MLPerf LoadGen: 299 requests without one that is late prove a p99, 250 do not; three
    late ones of 320 do not, a twentieth is proven harm, and one that failed is late."""
    rail = {"replay": "week", "metric": "ttft.p99", "test": "percentile_max", "within": "500ms"}
    asked = hypothesis(claims=[], design=NO_ARMS, guardrails=[rail])
    cases = (
        (320, 0, "pass"),
        (240, 0, "inconclusive"),
        (320, 3, "inconclusive"),
        (320, 16, "fail"),
    )
    for requests, late, decision in cases:
        alone = [
            replace(one, cluster=one.id, ttft_s=0.7 if int(one.id[1:]) < late else 0.4)
            for arm in (BASELINE, CANDIDATE)
            for one in replayed(arm, blocks=requests // 20)
        ]
        finding = found(judged(alone, asked), "ttft.p99")
        assert (finding.decision, finding.estimate) == (decision, pytest.approx(late / requests))
        assert finding.margin == pytest.approx(0.01)
    broken = failing([one for one in alone if one.ttft_s == 0.4], CANDIDATE, every=60)
    assert found(judged(broken, asked), "ttft.p99").estimate == pytest.approx(5 / 304)


def test_bad_outputs_of_one_conversation_are_not_so_many_proofs() -> None:
    """The same twelve events, one in each of twelve conversations, or all in one."""
    bad = {"suite": "qa", "metric": "bad_output", "test": "rate_max", "max": 0.05}
    asked = hypothesis(claims=[], design=NO_ARMS, guardrails=[bad])
    highs = []
    for hit in ({n * 12 for n in range(12)}, set(range(12))):
        rows = [
            replace(one, scores={"bad_output": float(int(one.id[1:]) in hit)})
            for arm in (BASELINE, CANDIDATE)
            for one in suite(arm, 480, a_cluster=12)
        ]
        highs.append(found(judged(rows, asked), "bad_output").high)
    apart, together = highs
    assert apart is not None and together is not None and together > 1.4 * apart


def test_answers_that_grow_or_shrink_are_seen_from_both_sides() -> None:
    rail = {"replay": "week", "metric": "output_tokens", "test": "tost", "margin": "10%"}
    asked = hypothesis(claims=[], design=NO_ARMS, guardrails=[rail])
    for factor, decision in ((1, "pass"), (2, "fail"), (0.5, "fail")):
        rows = [
            replace(one, completion_tokens=round((one.completion_tokens or 0) * factor))
            if arm == CANDIDATE
            else one
            for arm in (BASELINE, CANDIDATE)
            for one in replayed(arm)
        ]
        assert found(judged(rows, asked), "output_tokens").decision == decision


@pytest.mark.parametrize(
    ("direction", "factor", "claimed", "guarded"),
    [
        ("lower", 0.5, "pass", "pass"),
        ("lower", 1.0, "fail", "pass"),
        ("lower", 2.0, "fail", "fail"),
        ("higher", 2.0, "pass", "fail"),
    ],
)
def test_fewer_tokens_can_be_claimed_and_guarded(
    direction: str, factor: float, claimed: str, guarded: str
) -> None:
    """Also where not a single answer changes its length."""
    claim = {"replay": "week", "metric": "cost", "direction": direction, "min_effect": 0.1}
    rail = {"replay": "week", "metric": "cost", "test": "ratio_ni", "margin": 0.1}
    asked = hypothesis(claims=[claim], design=NO_ARMS, guardrails=[rail])
    rows = [
        replace(
            one,
            completion_tokens=round((one.completion_tokens or 0) * factor),
            prompt_tokens=round((one.prompt_tokens or 0) * factor),
        )
        if arm == CANDIDATE
        else one
        for arm in (BASELINE, CANDIDATE)
        for one in replayed(arm)
    ]
    by_kind = {one.kind: one for one in judged(rows, asked).findings}
    assert by_kind["claim"].decision == claimed
    assert by_kind["guardrail"].decision == guarded
    assert by_kind["claim"].estimate == pytest.approx(factor, rel=0.02)


def test_throughput_is_a_rate_of_blocks_and_more_of_it_is_better() -> None:
    rail = {"replay": "week", "metric": "throughput", "test": "ratio_ni", "margin": "10%"}
    asked = hypothesis(claims=[], design=NO_ARMS, guardrails=[rail])
    for share, decision in ((1.0, "pass"), (0.7, "fail")):
        rows = [*replayed(BASELINE), *(
            replace(one, completion_tokens=round((one.completion_tokens or 0) * share))
            for one in replayed(CANDIDATE)
        )]  # fmt: skip
        rate = found(judged(rows, asked), "throughput")
        assert (rate.decision, rate.margin) == (decision, 0.9)


def test_scores_of_repeats_are_averaged_before_they_are_tested() -> None:
    """Three repeats of 60 items are 60 items."""
    rows = [
        replace(
            one, repeat=n, scores={"correct": (n + int(one.id[1:])) % (3 + (arm == CANDIDATE)) / 3}
        )
        for arm in (BASELINE, CANDIDATE)
        for n in range(3)
        for one in suite(arm, 60)
    ]
    verdict = judged(rows, hypothesis(claims=[], design=NO_ARMS, guardrails=[CORRECT]))
    assert found(verdict, "correct").pairs == 60
    assert found(verdict, "correct").method == "betting"


# ---- the same answer ----------------------------------------------------------------------------

EXACT = {"suite": "qa", "metric": "divergence", "test": "identical", "margin": 0.02}


def test_answers_have_to_be_the_same_where_the_baseline_repeats_itself() -> None:
    """One that differs keeps it from passing; five are more than chance does to one arm only."""
    asked = hypothesis(
        claims=[], guardrails=[EXACT], kind_of_change="lossless_exact",
        candidate={"patch": {"runtime.step_tokens": 512}}, design={"sabotage_control": False},
    )  # fmt: skip
    same = [*suite(BASELINE), *suite(CANDIDATE), *suite(AA)]
    assert judged(same, asked).decision == "pass"
    for at, decision in ((1, "inconclusive"), (4, "inconclusive"), (5, "fail")):
        same[449 + at] = replace(same[449 + at], text="something else")
        same[450 : 450 + at] = [replace(one, text="something else") for one in same[450 : 450 + at]]
        verdict = judged(same, asked)
        assert (verdict.decision, found(verdict, "divergence").method) == (decision, "identity")


def test_a_conversation_whose_answers_differ_together_is_one_that_differs() -> None:
    """Ten turns of one talk are no ten proofs that chance did not do it."""
    asked = hypothesis(
        claims=[], guardrails=[EXACT], kind_of_change="lossless_exact",
        candidate={"patch": {"runtime.step_tokens": 512}}, design={"sabotage_control": False},
    )  # fmt: skip
    same = [*suite(BASELINE, a_cluster=10), *suite(AA, a_cluster=10)]
    for talks, decision in ((1, "inconclusive"), (5, "fail")):
        other = [
            replace(one, text="something else") if at < 10 * talks else one
            for at, one in enumerate(suite(CANDIDATE, a_cluster=10))
        ]
        assert judged([*same, *other], asked).decision == decision


def test_what_the_baseline_seldom_does_to_itself_is_bounded_over_all_requests() -> None:
    """A second baseline on a quarter of 1,000 rows, of which one differs: at one point these alone
    could prove nothing. Three of 1,000 of the candidate's differ, which is below a point; nine are
    too many to know.
    """
    asked = hypothesis(
        claims=[], guardrails=[{**EXACT, "margin": 0.01}], kind_of_change="lossless_exact",
        candidate={"patch": {"runtime.step_tokens": 512}}, design={"sabotage_control": False},
    )  # fmt: skip
    again = [replace(one, text="?") if one.id == "q00007" else one for one in suite(AA, 250)]
    for differing, decision in ((3, "pass"), (9, "inconclusive")):
        other = [
            replace(one, text="!") if int(one.id[1:]) % 100 == 50 and at < differing * 100 else one
            for at, one in enumerate(suite(CANDIDATE, 1000))
        ]
        verdict = judged([*suite(BASELINE, 1000), *other, *again], asked)
        finding = found(verdict, "divergence")
        assert (finding.decision, finding.pairs) == (decision, 1000)
        assert finding.candidate == pytest.approx(differing / 1000)


def test_a_tool_call_is_the_same_by_what_is_called_not_by_the_id_that_a_server_makes_up() -> None:
    asked = hypothesis(
        claims=[], guardrails=[EXACT], kind_of_change="lossless_exact",
        candidate={"patch": {"runtime.step_tokens": 512}}, design={"sabotage_control": False},
    )  # fmt: skip

    def calling(arm: str, order: str = "X1") -> list[Observation]:
        call = {"function": {"name": "status", "arguments": order}, "type": "function"}
        return [
            replace(one, text="", tool_calls=({**call, "id": f"call_{arm}{at}"},))
            for at, one in enumerate(suite(arm))
        ]

    arms = (BASELINE, CANDIDATE, AA)
    assert judged([one for arm in arms for one in calling(arm)], asked).decision == "pass"
    other = [*calling(BASELINE), *calling(CANDIDATE, "X2"), *calling(AA)]
    assert judged(other, asked).decision == "fail"


def test_a_baseline_that_does_not_repeat_itself_is_the_floor() -> None:
    """A tenth differs by chance in every second answer; the candidate does so too, elsewhere."""

    def chance(arm: str, at: int) -> list[Observation]:
        return [
            replace(one, text=f"{one.text} {arm}" if int(one.id[1:]) % 10 == at else one.text)
            for one in suite(arm, 1500)
        ]

    asked = hypothesis(
        claims=[], guardrails=[{**EXACT, "margin": 0.05}], kind_of_change="lossless_exact",
        candidate={"patch": {"runtime.step_tokens": 512}}, design={"sabotage_control": False},
    )  # fmt: skip
    rows = [*suite(BASELINE, 1500), *chance(CANDIDATE, 3), *chance(AA, 7)]
    verdict = judged(rows, asked)
    assert (verdict.decision, found(verdict, "divergence").estimate) == ("pass", 0.0)


def test_what_samples_by_another_law_is_found_and_what_samples_by_the_same_passes() -> None:
    """40 prompts asked sixty times each, at a temperature: no two runs say the same, and none
    needs to. One that says yes too often, by 20 points, is too far; two of one law are near enough.
    """
    asked = hypothesis(
        claims=[], kind_of_change="lossless_distribution", design={**NO_ARMS, "repeats": 60},
        candidate={"patch": {"runtime.speculation": {"proposer": "ngram"}}},
        guardrails=[{"suite": "qa", "metric": "law", "test": "law_max", "max": 0.02}],
    )  # fmt: skip

    def sampled(arm: str, often: float) -> list[Observation]:
        draw = random.Random(arm)
        return [
            replace(
                one, repeat=repeat, token_ids=(int(draw.random() < often), 7), accepted_tokens=1
            )
            for repeat in range(60)
            for one in suite(arm, 40)
        ]

    for often, decision in ((0.5, "pass"), (0.7, "fail")):
        verdict = judged([*sampled(BASELINE, 0.5), *sampled(CANDIDATE, often)], asked)
        finding = found(verdict, "law")
        assert (finding.decision, finding.pairs) == (decision, 40)
        assert (finding.detail["p_same_law"] < 0.05) == (decision == "fail")
    once = [one for one in sampled(BASELINE, 0.5) + sampled(CANDIDATE, 0.5) if one.repeat == 0]
    assert found(judged(once, asked), "law").reason == "not_measured"


# ---- sequential ---------------------------------------------------------------------------------

WATCHED = {"claims": [], "design": NO_ARMS, "stats": {"mode": "sequential"}}


def test_in_sequential_mode_evidence_is_valid_at_any_look() -> None:
    asked = hypothesis(**WATCHED, guardrails=[CORRECT])
    for wrong, decision in ((0.0, "pass"), (0.2, "fail")):
        rows = [*suite(BASELINE, 600), *suite(CANDIDATE, 600, wrong)]
        verdict = judged(rows, asked)
        assert (verdict.decision, verdict.findings[0].method) == (decision, "e_process")


def test_conversations_are_one_bet_each() -> None:
    asked = hypothesis(**WATCHED, guardrails=[CORRECT])
    rows = [one for arm in (BASELINE, CANDIDATE) for one in suite(arm, 600, a_cluster=20)]
    finding = found(judged(rows, asked), "correct")
    assert (finding.pairs, finding.clusters, finding.decision) == (600, 30, "inconclusive")


# ---- algebra ------------------------------------------------------------------------------------

RAILS = [
    CORRECT,
    TTFT,
    {"replay": "week", "metric": "output_tokens", "test": "tost", "margin": 0.1},
]


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(draw: object) -> None:
    rows = observed(wrong=0.05)
    asked = hypothesis(guardrails=[*RAILS, {**TTFT, "metric": "ttft.p95", "strata": ["tier"]}])
    shuffled = list(rows)
    draw.shuffle(shuffled)  # type: ignore[attr-defined]
    assert judged(shuffled, asked) == judged(rows, asked)


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 0.3), st.floats(0.7, 1.4), st.integers(0, 5), st.sampled_from([1, 3]))
def test_swapped_arms_mirror_every_estimate(
    wrong: float, slower: float, seed: int, a_cluster: int
) -> None:
    """What is lost one way is gained the other; bounds change sides."""
    names = {BASELINE: CANDIDATE, CANDIDATE: BASELINE}
    rows = [
        *suite(BASELINE, wrong=0.1, seed=seed, a_cluster=a_cluster),
        *suite(CANDIDATE, wrong=wrong, seed=seed, a_cluster=a_cluster),
        *replayed(BASELINE, seed=seed), *replayed(CANDIDATE, slower, seed=seed),
    ]  # fmt: skip
    asked = hypothesis(
        claims=[], design=NO_ARMS, guardrails=[*RAILS[::2], {**TTFT, "metric": "ttft.mean"}]
    )
    there = judge_pairs(asked, pair(*two_arms(rows)))
    back = judge_pairs(asked, pair(*two_arms([replace(one, arm=names[one.arm]) for one in rows])))
    for one, other in zip(there, back, strict=True):
        assert one.estimate is not None and one.low is not None and one.high is not None
        if one.unit == "difference":
            mirror = (-one.estimate, -one.high, -one.low)
            assert (one.lost, one.gained) == (other.gained, other.lost)
        else:
            mirror = (1 / one.estimate, 1 / one.high, 1 / one.low)
        assert (other.estimate, other.low, other.high) == pytest.approx(mirror, abs=2e-3)
        assert {one.decision, other.decision} != {"fail"}


def two_arms(rows: list[Observation]) -> tuple[list[Observation], list[Observation]]:
    arms = by_arm(rows)
    return arms[BASELINE], arms[CANDIDATE]


def test_an_arm_against_itself_never_fails() -> None:
    asked = hypothesis(guardrails=RAILS)
    base = [*suite(BASELINE), *replayed(BASELINE)]
    again = [replace(one, arm=CANDIDATE) for one in base]
    for one in judge_pairs(asked, pair(base, again)):
        if one.kind == "guardrail":
            assert one.decision == "pass"
            assert one.estimate == (0.0 if one.unit == "difference" else 1.0)


# ---- what gets worse as it goes -----------------------------------------------------------------


def going(lost_at_last: float, slower_at_last: float, turns: int = 5) -> list[Observation]:
    """A candidate that gets worse from turn to turn, and slower from block to block."""
    draw = random.Random(4)
    rows = []
    for one in suite(CANDIDATE, 1000, a_cluster=turns):
        turn = int(one.id[1:]) % turns
        wrong = draw.random() < lost_at_last * turn / (turns - 1)
        right = one.scores["correct"] * (not wrong)
        rows.append(replace(one, turn=turn, scores={"correct": right, "bad_output": 0.0}))
    base = [
        replace(one, turn=int(one.id[1:]) % turns) for one in suite(BASELINE, 1000, a_cluster=turns)
    ]
    slow = [
        replace(one, ttft_s=(one.ttft_s or 0) * (1 + slower_at_last * one.block / 15))
        for one in replayed(CANDIDATE)
    ]
    return [*base, *rows, *replayed(BASELINE), *slow]


@pytest.mark.parametrize(
    ("lost", "slower", "said"),
    [
        (0.0, 0.0, ""),
        (0.12, 0.0, "suite:qa correct by turn by"),
        (0.0, 0.4, "replay:week ttft.p50 by uptime by"),
    ],
)
def test_a_candidate_that_gets_worse_as_it_goes_does_not_pass(
    lost: float, slower: float, said: str
) -> None:
    """Though its mean over the run is within the margin: the next hour is not in the run."""
    rails = [{**CORRECT, "margin": 0.1}, {**TTFT, "margin": 0.3}]
    asked = hypothesis(claims=[], design=NO_ARMS, guardrails=rails)
    verdict = judged(going(lost, slower), asked)
    assert {one.decision for one in verdict.findings if one.stratum == "all"} == {"pass"}
    if not said:
        assert (verdict.decision, verdict.controls[-1].name) == ("pass", "trend")
    else:
        assert (verdict.decision, verdict.reason) == ("inconclusive", "gets_worse")
        assert said in verdict.reasons[0]


def test_what_gains_in_first_turns_alone_does_not_get_worse() -> None:
    """A response cache answers first questions at once and later ones as before."""
    gains = [
        replace(one, turn=at % 5, ttft_s=(one.ttft_s or 0) * (0.1 if at % 10 == 0 else 1.0))
        for at, one in enumerate(replayed(CANDIDATE))
    ]
    base = [replace(one, turn=at % 5) for at, one in enumerate(replayed(BASELINE))]
    rows = [*suite(BASELINE, 1000), *suite(CANDIDATE, 1000), *base, *gains]
    asked = hypothesis(claims=[], design=NO_ARMS, guardrails=[CORRECT, TTFT])
    verdict = judged(rows, asked)
    told = verdict.controls[-1].detail["metrics"]["replay:week ttft.p50 by turn"]
    assert told["growth"] > told["margin"] and told["p"] < 0.01
    assert verdict.decision == "pass"


def test_the_strictest_of_several_margins_of_a_metric_holds_for_what_grows_in_it() -> None:
    """In whichever order the file has them; the first one's alone was looked at once."""
    wide, narrow = {**CORRECT, "margin": 0.3}, {**CORRECT, "margin": 0.1}
    for rails in ([wide, narrow], [narrow, wide]):
        asked = hypothesis(claims=[], design=NO_ARMS, guardrails=rails)
        verdict = judged(going(0.12, 0.0), asked)
        assert (verdict.decision, verdict.reason) == ("inconclusive", "gets_worse")
        metrics = verdict.controls[-1].detail["metrics"]
        assert [metrics[name]["margin"] for name in metrics if name.endswith("turn")] == [0.1]
    alone = judged(going(0.12, 0.0), hypothesis(claims=[], design=NO_ARMS, guardrails=[wide]))
    assert alone.decision == "pass"


def test_late_requests_of_two_limits_are_two_metrics_that_may_grow() -> None:
    """Beside the times themselves, whose name they have."""
    late = {"replay": "week", "metric": "ttft.p90", "test": "percentile_max"}
    rails = [
        {**late, "within": "90ms"},
        {**late, "within": "100ms"},
        {**TTFT, "metric": "ttft.p90"},
    ]
    verdict = judged(going(0.0, 0.0), hypothesis(claims=[], design=NO_ARMS, guardrails=rails))
    metrics = verdict.controls[-1].detail["metrics"]
    assert list(metrics) == [
        "guardrail 1 week ttft.p90 percentile_max by uptime",
        "guardrail 2 week ttft.p90 percentile_max by uptime",
        "replay:week ttft.p90 by uptime",
    ]
    assert len({one["growth"] for one in metrics.values()}) == 3


@pytest.mark.parametrize(
    "patch",
    [
        {"gateway.trim.tool_output_chars": 900},
        {"gateway.trim": {"passages": {"keep": 3}}},
        {"gateway.trim.passages.keep": 3},
    ],
)
def test_what_is_shortened_message_by_message_is_told_by_its_prompt(patch: dict[str, Any]) -> None:
    """No cut is told of it, and it was taken for a change that never ran."""
    asked = hypothesis(
        claims=[], design=NO_ARMS, guardrails=[CORRECT], kind_of_change="lossy_input",
        candidate={"patch": patch},
    )  # fmt: skip
    base, same = list(suite(BASELINE)), list(suite(CANDIDATE))
    assert judged([*base, *same], asked).reason == "not_activated"
    shorter = [replace(one, prompt_tokens=80) if one.id < "q00200" else one for one in same]
    verdict = judged([*base, *shorter], asked)
    assert verdict.decision == "pass"
    assert [(one.stratum, one.pairs) for one in verdict.findings] == [
        ("all", 400),
        ("affected", 200),
    ]
    cut = hypothesis(
        claims=[], design=NO_ARMS, guardrails=[CORRECT], kind_of_change="lossy_input",
        candidate={"patch": {"gateway.trim": {"drop": "oldest"}}},
    )  # fmt: skip
    assert judged([*base, *shorter], cut).reason == "not_activated"


# ---- reasons ------------------------------------------------------------------------------------


def test_a_metric_that_no_answer_speaks_of_is_not_measured() -> None:
    """A guardrail on what no row has is no pass, however good the rest is."""
    rails = [CORRECT, {**CORRECT, "metric": "json"}]
    verdict = judged(observed(), hypothesis(claims=[], guardrails=rails, design=NO_ARMS))
    assert (verdict.decision, verdict.reason) == ("inconclusive", "not_measured")
    assert "no request of suite:qa says anything about json" in verdict.reasons[0]


def test_two_methods_that_disagree_are_told_and_prove_nothing() -> None:
    """Each block's median is the same in both arms, to the digit; but of four requests, each slow
    in one arm and fast in the other, it says little, as drawing from them anew shows."""
    times = (0.05, 0.1, 0.2, 0.4)
    rows = [
        replace(one, ttft_s=times[(int(one.id[1:]) + 2 * (arm == CANDIDATE)) % 4])
        for arm in (BASELINE, CANDIDATE)
        for one in replayed(arm)
        if int(one.id[1:]) % 20 < 4
    ]
    verdict = judged(rows, hypothesis(claims=[], guardrails=[TTFT], design=NO_ARMS))
    assert (verdict.decision, verdict.reason) == ("inconclusive", "methods_disagree")
    assert "two methods disagree" in verdict.reasons[0]
