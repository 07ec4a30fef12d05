"""Every test of `evals.stats` on simulated gates: how often it passes, where the truth is known.

Each part gives kinds of rates (`false_pass`, `power`, `flagged`, `usual`), each setting's by name,
with the number of gates it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, lru_cache

import numpy as np
from scipy import special, stats

from benchmarks.lab import gates
from benchmarks.lab.gates import Floats, Ints
from evals.stats import clustered, divergence, paired, power, rates, ratio, tango
from evals.stats.betting import bets, log_wealth
from evals.stats.estimate import moments

ALPHA = 0.05
Z = float(-special.ndtri(ALPHA))
Rates = dict[str, tuple[float, int]]  # setting -> rate, gates

PAIRS = (50, 150, 310, 928, 3000)
SHARES = (0.01, 0.02, 0.03, 0.06, 0.12, 0.3)  # of pairs that flip
MARGINS = (0.01, 0.02, 0.05)
SIZES = {
    "20 x 10": np.full(20, 10),
    "30 x 10": np.full(30, 10),
    "60 x 10": np.full(60, 10),
    "100 x 10": np.full(100, 10),
    "300 x 3": np.full(300, 3),
    "40 of 1 to 40": np.arange(1, 41),
    "80 of 1 to 20": np.repeat(np.arange(1, 21), 4),
}
CORRELATIONS = (0.05, 0.3, 0.6)
FLIPS_AND_MARGINS = ((0.02, 0.02), (0.06, 0.02), (0.06, 0.05), (0.12, 0.05), (0.3, 0.05))


def count(full: int, share: float) -> int:
    return max(int(full * share), 20)


def rate(passed: object) -> tuple[float, int]:
    array = np.asarray(passed)
    return float(array.mean()), int(array.size)


@cache
def _critical(n: int, margin: float) -> float:
    return tango.critical(n, -margin, ALPHA)


@lru_cache(maxsize=100_000)
def _exact_p(lost: float, gained: float, n: int, margin: float) -> float:
    return tango.p_value(lost, gained, n, margin)


def _passes(
    lost: Ints, gained: Ints, n: int, margin: float
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """What `tango(...).p <= alpha` says of each: the exact p is at most alpha from there on."""
    return np.asarray(tango.statistic(lost, gained, n, -margin) >= _critical(n, margin))


# ---- right or wrong, each pair on its own --------------------------------------------------------


def pairs(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    exact: Rates = {}
    normal: Rates = {}
    wald: Rates = {}
    for n in PAIRS:
        for margin in MARGINS:
            for flips in (one for one in SHARES if one >= margin):
                lost, gained = gates.flips(rng, count(20_000, share), n, flips, -margin)
                name = f"{n} pairs, {100 * flips:g} % flips, {100 * margin:g} points"
                exact[name] = rate(_passes(lost, gained, n, margin))
                normal[name] = rate(tango.statistic(lost, gained, n, -margin) >= Z)
                diff = (gained - lost) / n
                spread = np.sqrt(np.maximum((gained + lost) / n - diff**2, 0) / n)
                wald[name] = rate(diff - Z * spread > -margin)
    lost, gained = gates.flips(rng, count(20_000, share), 200, 0.06, -0.02)
    discordant = np.maximum(lost + gained, 1)
    mcnemar = np.minimum(2 * special.bdtr(np.minimum(lost, gained), discordant, 0.5), 1.0)
    return {
        "false_pass": exact,
        "usual, score test by the normal law": normal,
        "usual, Wald": wald,
        "usual, Wald, 50 pairs, 3 % flips": {
            name: found for name, found in wald.items() if name.startswith("50 pairs, 3 % flips")
        },
        "usual, McNemar not significant, 200 pairs, 6 % flips, 2 points": {
            "exact": rate(mcnemar > 0.05),
            "chi-square": rate((lost - gained) ** 2 / discordant < stats.chi2.ppf(0.95, 1)),
        },
    }


def plan(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    planned: Rates = {}
    by_rule: Rates = {}
    for margin in MARGINS:
        for flips in (0.01, 0.02, 0.06, 0.12):
            for found, n in (
                (planned, power.pairs_needed(flips, margin)),
                (by_rule, power.pairs_by_rule(flips, margin)),
            ):
                lost, gained = gates.flips(rng, count(20_000, share), n, flips, 0.0)
                name = f"{100 * margin:g} points, {100 * flips:g} % flips: {n} pairs"
                found[name] = rate(_passes(lost, gained, n, margin))
    return {"power": planned, "usual, (z_a + z_b)^2 flips / margin^2": by_rule}


# ---- clusters ------------------------------------------------------------------------------------


def _near_alpha(lost: float, gained: float, n: int, margin: float) -> float:
    """The exact p; far from alpha, where both decide alike, that of the normal law."""
    z = float(tango.statistic(lost, gained, n, margin))
    return _exact_p(lost, gained, n, margin) if 1.2 < z < 2.8 else float(special.ndtr(-z))


def _cluster_p(lost: Ints, gained: Ints, sizes: Ints, margin: float) -> Floats:
    """Of each gate, a row."""
    counts = lost.astype(float), gained.astype(float)
    return clustered.cluster_p(*counts, sizes.astype(float), -margin, _near_alpha)


def clusters(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    false_pass: Rates = {}
    plain: Rates = {}
    naive: Rates = {}
    for named, sizes in SIZES.items():
        for correlation in CORRELATIONS:
            for flips, margin in FLIPS_AND_MARGINS:
                lost, gained = gates.clustered_flips(
                    rng, count(4000, share), sizes, flips, -margin, correlation
                )
                name = f"{named}, {correlation:g}, {100 * flips:g} % flips, {100 * margin:g} points"
                false_pass[name] = rate(_cluster_p(lost, gained, sizes, margin) <= ALPHA)
                n, sums = int(sizes.sum()), (gained - lost).astype(float)
                mean = sums.sum(axis=1) / n
                error, _ = moments(sums - np.outer(mean, sizes), sizes.astype(float))
                reach = float(special.stdtrit(sizes.size - 1, 1 - ALPHA))
                plain[name] = rate(mean - reach * error > -margin)
                flat = np.sqrt(np.maximum((gained + lost).sum(axis=1) / n - mean**2, 0) / n)
                naive[name] = rate(mean - Z * flat > -margin)
    return {
        "false_pass": false_pass,
        "usual, t by clusters": plain,
        "usual, t by clusters, 0.3, 6 % flips, 2 points": {
            named: plain[f"{named}, 0.3, 6 % flips, 2 points"] for named in ("20 x 10", "60 x 10")
        },
        "usual, clusters overlooked": naive,
    }


def scores(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    false_pass: Rates = {}
    plain: Rates = {}
    for law in (gates.dense_scores, gates.sparse_scores):
        for number, rows in ((20, 10), (40, 5), (100, 5), (200, 1)):
            for margin in (0.02, 0.05):
                sums = law(rng, count(6000, share), number, rows, -margin)
                name = f"{law.__name__}, {number} x {rows}, {100 * margin:g} points"
                sizes = np.full(number, float(rows))
                fit = paired.cluster_fit(sums, sizes)
                bets_on = [paired.few_lose(row) for row in sums]  # bets pass less often still
                false_pass[name] = rate((fit.p(-margin) <= ALPHA) & ~np.array(bets_on))
                t = (fit.mean + margin) / np.maximum(fit.error, 1e-12)
                plain[name] = rate(special.stdtr(number - 1, -t) <= ALPHA)
    return {"false_pass": false_pass, "usual, t by clusters": plain}


def few_scores(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    false_pass: Rates = {}
    plain: Rates = {}
    for n in (30, 60, 99):
        for margin in (0.02, 0.1):
            drawn = gates.few_scores(rng, count(2000, share), n, -margin)
            name = f"{n} scores, {100 * margin:g} points"
            false_pass[name] = rate([log_wealth(row, -margin) >= -math.log(ALPHA) for row in drawn])
            error = drawn.std(axis=1, ddof=1) / math.sqrt(n)
            reach = special.stdtrit(n - 1, 1 - ALPHA) * error
            plain[name] = rate(drawn.mean(axis=1) - reach > -margin)
    return {"false_pass": false_pass, "usual, t": plain}


# ---- times, tokens, rates, laws ------------------------------------------------------------------

ABBA, AB = "ABBA" * 6, "A" * 12 + "B" * 12
DRIFT = {"drift": 1.15, "wander": 0.01}


def latency(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    """A machine that becomes 15 % slower in a run and wanders by 1 % a block; 12 block pairs, of 80
    requests that are alike, or of 20 whose lengths differ by a factor of e.
    """
    false_pass: Rates = {}
    told: Rates = {}
    planned: Rates = {}
    for q in (0.5, 0.95):
        drawn = gates.latency_blocks(rng, count(1500, share), ABBA, 80, 1.10, **DRIFT)
        p = [ratio.quantile_ratio(*pair, q, 1.10, ALPHA, rng).p for pair in drawn]
        false_pass[f"p{100 * q:g} slower by the margin of 10 %"] = rate(np.array(p) <= ALPHA)
        same = gates.latency_blocks(rng, count(1500, share), ABBA, 80, 1.0, **DRIFT)
        told[f"p{100 * q:g}"] = rate([_told_apart(*pair, q) for pair in same])
        mixed = gates.latency_blocks(rng, count(1500, share), ABBA, 20, 1.10, **DRIFT, unlike=1.0)
        p = [ratio.quantile_ratio(*pair, q, 1.10, ALPHA, rng).p for pair in mixed]
        name = f"p{100 * q:g} of unlike requests, slower by the margin of 10 %"
        false_pass[name] = rate(np.array(p) <= ALPHA)
    for spread in (0.05, 0.1, 0.2):
        number = max(power.block_pairs_needed(spread, 1.10), ratio.FEWEST_BLOCK_PAIRS)
        logs = rng.normal(0, spread, (count(4000, share), number))
        passed = [ratio.block_t(row, 1.10, ALPHA).p <= ALPHA for row in logs]
        planned[f"spread {spread:g}: {number} block pairs"] = rate(passed)
    sequel = list(gates.latency_blocks(rng, count(1500, share), AB, 80, 1.0, **DRIFT))
    ranks = [
        stats.mannwhitneyu(np.concatenate(before), np.concatenate(after)).pvalue < 2 * ALPHA
        for before, after in sequel[: count(400, share)]
    ]
    return {
        "false_pass": false_pass,
        "flagged": told,
        "power of block pairs": planned,
        "usual, one arm after the other: flagged": {
            "p50": rate([_told_apart(*pair, 0.5) for pair in sequel]),
            "Mann-Whitney": rate(ranks),
        },
    }


def _told_apart(before: list[Floats], after: list[Floats], q: float) -> bool:
    logs = [
        math.log(np.quantile(b, q) / np.quantile(a, q)) for a, b in zip(before, after, strict=True)
    ]
    found = ratio.block_t(logs, 1.0, ALPHA)
    return min(found.p, found.p_harm) <= ALPHA


def equality(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    false_pass: Rates = {}
    for truth in (1.10, 1 / 1.10):
        for number, rows in ((20, 10), (60, 5), (300, 1)):
            passed = []
            names = np.repeat(np.arange(number), rows).tolist()
            for _ in range(count(2000, share)):
                own = np.repeat(rng.standard_t(5, number) * 0.1, rows)
                logs = math.log(truth) + own + rng.normal(0, 0.2, number * rows)
                passed.append(ratio.tost(logs, 0.10, names, ALPHA).p <= ALPHA)
            false_pass[f"{number} x {rows}, truth {truth:.3f}"] = rate(passed)
    return {"false_pass": false_pass}


def rare_events(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    false_pass: Rates = {}
    for n, maximum in ((299, 0.01), (1000, 0.002), (1498, 0.002), (5000, 0.002), (928, 0.03)):
        events = rng.binomial(n, maximum, count(20_000, share))
        p = {int(one): rates.clopper_pearson(int(one), n, maximum).p for one in np.unique(events)}
        false_pass[f"{n} requests, at most {maximum:g}"] = rate(
            [p[int(one)] <= ALPHA for one in events]
        )
    plain: Rates = {}
    for named in ("60 x 10", "100 x 10", "300 x 3", "80 of 1 to 20"):
        sizes = SIZES[named]
        for correlation in CORRELATIONS:
            for maximum in (0.005, 0.02, 0.05):
                happened, _ = gates.clustered_flips(
                    rng, count(4000, share), sizes, maximum, -maximum, correlation
                )
                name = f"{named}, {correlation:g}, at most {maximum:g}"
                told = rates.cluster_rate_p(happened.astype(float), sizes.astype(float), maximum)
                false_pass[name] = rate(told <= ALPHA)
                total = happened.sum(axis=1)
                plain[name] = rate(rates.rate_p(total, sizes.sum(), maximum) <= ALPHA)
    return {"false_pass": false_pass, "usual, clusters overlooked": plain}


def laws(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    false_pass: Rates = {}
    told: Rates = {}
    one, other = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.3, 0.2])
    apart = float(((one - other) ** 2).sum())
    for prefixes, draws in ((40, 20), (120, 8)):
        passed, flagged, alike = [], [], []
        for _ in range(count(1500, share)):
            drawn = [list(rng.choice(3, (prefixes, draws), p=law)) for law in (one, other, one)]
            found = divergence.law_distance(drawn[0], drawn[1], apart, ALPHA)
            passed.append(found.p <= ALPHA)
            flagged.append(divergence.same_law(drawn[0], drawn[2], rng, 99) <= 2 * ALPHA)
            numbers = rng.random((prefixes, draws))  # of the seeds that both arms are sent
            seeded = [list(np.searchsorted(np.cumsum(law)[:2], numbers)) for law in (one, other)]
            found = divergence.law_distance(seeded[0], seeded[1], apart, ALPHA)
            alike.append(found.p <= ALPHA)
        false_pass[f"{prefixes} prefixes, {draws} draws"] = rate(passed)
        false_pass[f"{prefixes} prefixes, {draws} draws, seeds in common"] = rate(alike)
        told[f"{prefixes} prefixes, {draws} draws"] = rate(flagged)
    return {"false_pass": false_pass, "flagged": told}


# ---- looking as often as one likes ---------------------------------------------------------------

SEQUENCE = 3000


def sequential(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    number = count(2000, share)
    false_pass: Rates = {}
    passed: Rates = {}
    rolled: Rates = {}
    medians: Rates = {}
    for margin, flips in ((0.02, 0.06), (0.05, 0.12)):
        name = f"{100 * margin:g} points, {100 * flips:g} % flips"
        for loss in (0.0, margin, 2 * margin):
            drawn = _sequence(rng, number, flips, -loss)
            safe, harmful = _first(drawn, -margin), _first(-drawn, margin)
            pass_first = (safe < harmful) & (safe <= SEQUENCE)
            roll_first = (harmful < safe) & (harmful <= SEQUENCE)
            if loss == 0:
                passed[name] = rate(pass_first)
                medians[f"{name}, nothing lost"] = (float(np.median(safe)), number)
            elif loss == margin:
                false_pass[name] = rate(safe <= SEQUENCE)
                false_pass[f"{name}, rolled back"] = rate(harmful <= SEQUENCE)
            else:
                rolled[name] = rate(roll_first)
                medians[f"{name}, twice the margin lost"] = (float(np.median(harmful)), number)
    return {
        "false_pass": false_pass,
        "passed, nothing lost": passed,
        "rolled back, twice the margin lost": rolled,
        "median pairs until decided": medians,
        "usual, score test every 50 pairs": {
            f"2 points, 6 % flips, up to {most} pairs": rate(_peeking(rng, number, most))
            for most in (1000, SEQUENCE)
        },
    }


def _sequence(
    rng: np.random.Generator, number: int, flips: float, diff: float
) -> np.ndarray[tuple[int, int], np.dtype[np.int8]]:
    """-1, 0 or 1 for every pair."""
    drawn = rng.random((number, SEQUENCE), dtype=np.float32)
    gain = (flips + diff) / 2
    return (drawn < gain).astype(np.int8) - ((drawn >= gain) & (drawn < flips)).astype(np.int8)


def _first(diffs: np.ndarray[tuple[int, int], np.dtype[np.int8]], margin: float) -> Ints:
    """The pair after which `EProcess` has its proof; beyond the last for never."""
    stakes = bets(margin)
    factors = np.log1p(np.outer(stakes, np.array([-1.0, 0.0, 1.0]) - margin))
    first = np.empty(diffs.shape[0], dtype=np.int64)
    for start in range(0, diffs.shape[0], 100):
        rows = diffs[start : start + 100] + 1
        wealth = sum(np.exp(np.cumsum(factor[rows], axis=1)) for factor in factors) / stakes.size
        proven = np.asarray(wealth) >= 1 / ALPHA
        first[start : start + 100] = np.where(
            proven.any(axis=1), proven.argmax(axis=1) + 1, SEQUENCE + 1
        )
    return first


def _peeking(
    rng: np.random.Generator, number: int, most: int
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """A loss of the margin, tested anew every 50 pairs until it passes."""
    drawn = _sequence(rng, number, 0.06, -0.02)[:, :most]
    lost, gained = np.cumsum(drawn < 0, axis=1), np.cumsum(drawn > 0, axis=1)
    passed = np.zeros(number, dtype=bool)
    for n in range(50, most + 1, 50):
        passed |= np.asarray(tango.statistic(lost[:, n - 1], gained[:, n - 1], n, -0.02) >= Z)
    return passed


# ---- the whole gate ------------------------------------------------------------------------------


def all_guardrails(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    """Five guardrails of 2 points at 6 % flips: all must pass, each planned with more power."""
    number, k = count(10_000, share), 5
    each = power.pairs_needed(0.06, 0.02, ALPHA, power.guardrail_power(0.8, k))
    alone = power.pairs_needed(0.06, 0.02)
    found: dict[str, Rates] = {}
    for kind, n, worst in (
        ("false_pass", each, -0.02),
        ("power of five", each, 0.0),
        ("usual, power of five", alone, 0.0),
    ):
        passed = np.ones(number, dtype=bool)
        for guardrail in range(k):
            lost, gained = gates.flips(rng, number, n, 0.06, worst if guardrail == 0 else 0.0)
            passed &= _passes(lost, gained, n, 0.02)
        found[kind] = {f"{n} pairs each": rate(passed)}
    return found


def same_arm(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    """Right or wrong of one arm against itself: a difference of 0 refused on either side."""
    told: Rates = {}
    for n in (200, 928):
        for flips in (0.02, 0.06, 0.3):
            lost, gained = gates.flips(rng, count(20_000, share), n, flips, 0.0)
            either = _passes(lost, gained, n, 0.0) | _passes(gained, lost, n, 0.0)
            told[f"{n} pairs, {100 * flips:g} % flips"] = rate(either)
    for named in ("60 x 10", "80 of 1 to 20"):
        sizes = SIZES[named]
        lost, gained = gates.clustered_flips(rng, count(4000, share), sizes, 0.12, 0.0, 0.3)
        either = _cluster_p(lost, gained, sizes, 0.0) <= ALPHA
        either |= _cluster_p(gained, lost, sizes, 0.0) <= ALPHA
        told[f"{named}, 12 % flips"] = rate(either)
    return {"flagged": told}


PARTS: Mapping[str, Callable[[np.random.Generator, float], Mapping[str, Rates]]] = {
    "pairs": pairs,
    "plan": plan,
    "clusters": clusters,
    "scores": scores,
    "few scores": few_scores,
    "latency": latency,
    "equality": equality,
    "rates": rare_events,
    "laws": laws,
    "sequential": sequential,
    "guardrails": all_guardrails,
    "same arm": same_arm,
}
