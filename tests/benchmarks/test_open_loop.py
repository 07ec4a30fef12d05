"""Arrivals on a clock that computes: what is skipped, what is measured."""

from __future__ import annotations

from benchmarks.lab import models
from benchmarks.lab.open_loop import Arrival, ComputeClock, Served, serve_arrivals
from cache.tokens import Tokenizer
from runtime.engine import Engine
from runtime.loading import load_model
from runtime.sequence import Service


def test_waiting_costs_no_time_and_skipping_backwards_does_nothing():
    """A quiet hour passes at once; computing alone makes time go on."""
    clock = ComputeClock()
    clock.skip_to(3600.0)
    assert 3600.0 <= clock() < 3601.0
    clock.skip_to(10.0)
    assert clock() >= 3600.0


def test_gaps_and_first_tokens_follow_from_the_moments():
    """The gap to look at is the one between two tokens, the first token is told apart."""
    served = Served(Arrival(1.0, "chat", [1], 3, Service()), [1.5, 2.0, 4.0])
    assert served.ttft_s == 0.5
    assert served.gaps_s == [0.5, 2.0]
    assert served.tpot_s == 1.25


def test_every_arrival_is_served_after_it_has_come(tmp_path):
    """The engine steps on while others arrive, and sits out the time until the next one comes."""
    folder = models.make(models.TINY, tmp_path)
    model, _ = load_model(folder, kv_tokens=1024, device="cpu", dtype="fp32")
    clock = ComputeClock()
    engine = Engine(
        model, Tokenizer.load(folder), emit=lambda _: None, step_tokens=32, now=clock, timer=clock
    )
    arrivals = [Arrival(at, "chat", list(range(40)), 5, Service()) for at in (500.0, 2.0, 2.0)]
    served = serve_arrivals(engine, clock, arrivals)
    assert [one.arrival.at_s for one in served] == [2.0, 2.0, 500.0]
    assert all(len(one.token_s) == 5 and one.ttft_s > 0 for one in served)
    assert served[1].token_s[-1] < 500.0 < served[2].token_s[0]
    engine.check()
