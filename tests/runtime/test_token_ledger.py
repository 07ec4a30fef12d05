"""A worker's token ledger: its invariants, and that an engine which miscounts is found out.

That they hold of what an engine really does is asserted wherever tests run one (`Checked` in
table_model.py, `serving` in test_server.py, test_everything.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from runtime.sequence import Sampling, Sequence, Service
from runtime.speculation import Mode, Modes, Speculation
from runtime.tally import Tally
from runtime.token_ledger import INVARIANTS, STAGES, Counts, Entry, violated
from spec_decode.ngram import NGram
from tests.runtime.table_model import World, answers

TRUE = Entry(
    Counts(prefilled=4, drafted=6, accepted=2, sampled=3, emitted=5, computed=24),
    templated=20, cached=16, said=5, allowed=8, proposed=6, preempted=False,
)  # fmt: skip
MISCOUNTS: dict[str, dict[str, Any]] = {
    "prefilled_and_cached_is_templated": {"prefilled": 5},
    "cached_within_templated": {"cached": -1, "prefilled": 21},
    "drafted_as_proposed": {"drafted": 7},
    "accepted_within_drafted": {"drafted": 1, "proposed": 1},
    "emitted_is_sampled_and_accepted": {"sampled": 4},
    "emitted_as_said": {"emitted": 6, "sampled": 4},
    "emitted_within_allowed": {"allowed": 4},
    "computed_is_all_but_last": {"computed": 25},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("table"))


@pytest.mark.parametrize("name", INVARIANTS)
def test_each_invariant_finds_its_miscount(name: str) -> None:
    assert violated(TRUE) == ()
    wrong = MISCOUNTS[name]
    counted = {field: wrong[field] for field in wrong if field in Counts.__slots__}
    counts = replace(TRUE.counts, **counted)
    rest = {field: wrong[field] for field in wrong if field not in counted}
    assert violated(replace(TRUE, counts=counts, **rest)) == (name,)
    assert set(TRUE.stages()) == set(STAGES)


def test_what_was_preempted_may_have_been_computed_again() -> None:
    counts = replace(TRUE.counts, prefilled=9)
    assert violated(replace(TRUE, counts=counts, preempted=True)) == ()
    less = replace(TRUE.counts, prefilled=3)
    assert violated(replace(TRUE, counts=less, preempted=True)) != ()


class Meddler:
    """A listener that touches what is not its own: each step it counts one more of `stage`."""

    def __init__(self, stage: str = "sampled") -> None:
        self.stage = stage

    def sampled(self, sequences: list[Sequence], now: float) -> None:
        for sequence in sequences:
            counts = sequence.counts
            setattr(counts, self.stage, getattr(counts, self.stage) + 1)

    def guessed(self, guessed: int, accepted: int, said: int) -> None: ...
    def stepped(self, record: object) -> None: ...
    def ended(self, sequence: Sequence, reason: str, now: float) -> None: ...


def test_an_engine_that_miscounts_is_found_out(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Each answer is counted under what does not hold of it, and logged with its request's id; an
    engine that counts right leaves no trace."""
    prompts = [world.encode("abcd" * 5), world.encode("ab")]
    samplings = [Sampling(temperature=0, max_tokens=6, ignore_eos=True)] * 2
    service = Service(request_id="req-7")
    honest, meddled = Tally(4096), Tally(4096)
    answers(world.engine(listeners=[honest]), prompts, samplings, service=service)
    assert not any(honest.violations.values())
    assert honest.checked == 2
    assert honest.stages["emitted"] == honest.stages["sampled"] == 12
    assert honest.stages["prefilled"] == honest.stages["templated"] == 22
    assert not caplog.records
    listeners = [Meddler(), meddled]
    answers(world.engine(listeners=listeners), prompts, samplings, service=service)
    wrong = {name for name, count in meddled.violations.items() if count}
    assert wrong == {"emitted_is_sampled_and_accepted"}
    assert meddled.violations["emitted_is_sampled_and_accepted"] == 2
    assert "request req-7: its tokens do not add up" in caplog.text


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        ("drafted", {"drafted_as_proposed"}),
        ("accepted", {"emitted_is_sampled_and_accepted"}),
        ("sampled", {"emitted_is_sampled_and_accepted"}),
        ("emitted", {"emitted_is_sampled_and_accepted", "emitted_as_said"}),
    ],
)
def test_guesses_that_are_miscounted_are_found_out(
    world: World, stage: str, wrong: set[str]
) -> None:
    """Of an engine that guesses, right and wrong; one that counts right leaves no trace."""
    prompts = [world.encode("abcd" * 5), world.encode("ab" * 4)]
    samplings = [Sampling(temperature=0, max_tokens=40, ignore_eos=True)] * 2
    honest, meddled = Tally(4096), Tally(4096)
    for listeners in ([honest], [Meddler(stage), meddled]):
        speculation = Speculation([NGram()], Modes(Mode("ngram", 4)))
        answers(world.engine(speculation, listeners=listeners), prompts, samplings)
    assert not any(honest.violations.values())
    assert honest.stages["drafted"] > honest.stages["accepted"] > 0
    assert {name for name, count in meddled.violations.items() if count} >= wrong
