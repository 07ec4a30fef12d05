"""What speculation's benchmark counts: every request, in turn, and ratios within a round."""

from __future__ import annotations

import pytest

from benchmarks.lab import models
from benchmarks.lab.speculating import OFF, WAYS, Bench, Told, Way, acceptance, serve_closed
from benchmarks.speculation import ABOUT, PARTS, _auto_over_best, _beside
from runtime.sequence import Sampling


def test_figures_follow_from_the_moments():
    """Two answers: what is behind their first tokens is told apart from the whole."""
    told = Told([[1.0, 2.0, 3.0], [2.0, 2.5]], [0.5, 1.5], took_s=4.0, steps=2)
    figures = told.figures()
    assert "acceptance" not in figures, "nothing was guessed"
    assert figures["tok_s"] == 5 / 4
    assert figures["decode_tok_s"] == 3 / 2.5
    assert figures["ttft_p50_ms"] == 500
    assert figures["tpot_p50_ms"] == 750
    assert figures["tokens_a_step"] == 2.5


def test_every_way_serves_the_same_requests_to_their_end(tmp_path):
    """So many at once, greedy, and the same answers for all; those that guess say how well."""
    bench = Bench(models.make(models.TINY, tmp_path), None, compiles=False)
    prompts = [list(range(10, 30)) * 2, [5, 6, 7], list(range(60))]
    sampling = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
    for way in (OFF, Way("self", "self", 2, ("self",))):
        engine = bench.engine(way, max_sequences=4)
        told = serve_closed(engine, prompts, sampling, 2)
        assert [len(one) for one in told.token_s] == [6, 6, 6]
        assert all(one == sorted(one) for one in told.token_s)
        assert told.took_s > 0
        assert told.came_s[2] >= min(told.token_s[0][-1], told.token_s[1][-1])
        guessed = acceptance(engine)
        assert bool(guessed) is (way.proposer == "self")
        assert 0 <= guessed.get("acceptance", 0) <= 1
        assert told.figures().get("acceptance") == guessed.get("acceptance"), "all were of this run"


def test_ratios_are_those_of_the_same_round():
    """A slow round slows all ways: medians of ratios, not ratios of medians."""
    names = ("tok_s", "decode_tok_s", "tpot_p99_ms")
    guessing = Way("x", "ngram", 3, ("ngram",))
    rounds = {
        OFF: [dict.fromkeys(names, speed) for speed in (10.0, 1.0, 5.0)],
        guessing: [dict.fromkeys(names, speed) for speed in (20.0, 2.0, 10.0)],
    }
    told = _beside(rounds, OFF)
    assert told["x"]["speedup"] == told["x"]["decode_speedup"] == 2
    assert told["off"]["tpot_p99_ratio"] == 1
    cell = {"off": {"speedup": 1.0}, "ngram 3": {"speedup": 1.2}, "auto": {"speedup": 9.0}}
    assert _auto_over_best(cell | {"auto with draft": {"speedup": 1.1}}) == pytest.approx(1.1 / 1.2)


def test_parts_and_ways_have_names_of_their_own():
    """What the help lists can be asked for."""
    assert ABOUT.parts == PARTS
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert WAYS[0] is OFF
