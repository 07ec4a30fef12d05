"""The scheduler computes every token once its turn comes, within its budget, and loses no block."""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.costs import StepCosts
from runtime.kv import BLOCK_TOKENS, BlockPool, blocks_for
from runtime.scheduler import Scheduler, Work
from runtime.sequence import Sampling, Sequence, Service, Times

GREEDY = Sampling(temperature=0, max_tokens=40)
COSTS = StepCosts([1, 16, 128, 1024], [0.010, 0.011, 0.040, 0.300])


def advance(scheduler: Scheduler, plan: list[Work] | None = None) -> None:
    """What the engine does with a plan: compute, seal, sample."""
    for work in scheduler.plan() if plan is None else plan:
        catches_up = work.catches_up
        work.sequence.computed += work.count
        scheduler.seal(work.sequence)
        if catches_up:
            work.sequence.tokens.append(2)


def sequence(key: int, prompt: int | list[int], **more) -> Sequence:
    """By default, prompts share nothing."""
    ids = [1000 * (key + 1) + at for at in range(prompt)] if isinstance(prompt, int) else prompt
    priority, arrived = more.pop("priority", 0), more.pop("arrived", 0.0)
    service = Service(priority, **more)
    return Sequence(key, ids, GREEDY, service, times=Times(arrived))


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps and cancels in any order, on a pool that is often too small.

    The pool's content is modelled as the tokens up to each position, so that a block that was
    found, shared, cut or overwritten wrongly shows as soon as somebody reads it.
    """

    @initialize(
        blocks=st.integers(4, 20),
        step_tokens=st.integers(16, 80),
        batch=st.integers(1, 9),
        timed=st.booleans(),
    )
    def start(self, blocks, step_tokens, batch, timed):
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(
            self.pool,
            step_tokens=step_tokens,
            max_sequences=batch,
            costs=COSTS if timed else None,
            tpot_s=0.02 if timed else None,
        )
        self.alive: list[Sequence] = []
        self.next_key = 0
        self.now = 0.0
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}

    @rule(
        prompt=st.integers(1, 60),
        family=st.integers(0, 2),
        shared=st.integers(0, 60),
        priority=st.sampled_from([0, 0, 0, -1, 5]),
    )
    def arrive(self, prompt, family, shared, priority):
        room = self.pool.total * BLOCK_TOKENS
        length = min(prompt, room - 1)
        ids = [10 + family if at < shared else 100 + self.next_key for at in range(length)]
        one = sequence(self.next_key, ids, priority=priority, arrived=self.now)
        self.next_key += 1
        self.alive.append(one)
        self.scheduler.add(one)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        one = data.draw(st.sampled_from(self.alive))
        self.alive.remove(one)
        self.scheduler.remove(one)
        assert one.blocks == []

    @rule()
    def forget(self):
        """Everything cached is forgotten; whoever holds blocks goes on with them."""
        self.pool.clear()

    @rule()
    def step(self):
        self.now += 1.0
        plan = self.scheduler.plan(self.now)
        assert bool(plan) == bool(self.alive), "work waits, so a step has work"
        assert sum(work.count for work in plan) <= self.scheduler.step_tokens
        assert len(plan) <= self.scheduler.max_sequences
        assert [w.count > 1 for w in plan] == sorted(w.count > 1 for w in plan), "decodes first"
        for work in plan:
            one = work.sequence
            assert 0 < work.count <= one.behind
            assert len(one.blocks) >= blocks_for(one.computed + work.count)
            self.compute(one, one.computed, one.computed + work.count)
        for work in plan:
            one = work.sequence
            catches_up = work.catches_up
            one.computed += work.count
            self.scheduler.seal(one)
            if catches_up:
                one.tokens.append(2)
                one.times.first_token = one.times.first_token or self.now
                one.times.last_token = self.now
                room = self.pool.total * BLOCK_TOKENS
                if one.answer_tokens >= 40 or len(one.tokens) >= room:
                    self.alive.remove(one)
                    self.scheduler.remove(one)

    def compute(self, one: Sequence, first: int, end: int) -> None:
        """Writes the new positions, as far as they are not shared, then reads all before them."""
        for at in range(first, end):
            place = (one.blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS)
            if at >= one.sealed * BLOCK_TOKENS:
                self.content[place] = tuple(one.tokens[: at + 1])
        for at in range(end):
            place = (one.blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS)
            assert self.content[place] == tuple(one.tokens[: at + 1]), "a stale or foreign block"

    @precondition(lambda self: self.alive)
    @rule()
    def the_first_always_ends(self):
        """However small the pool, the one that comes first makes progress to its end."""
        first = min(self.alive, key=lambda one: one.rank)
        for _ in range(400):
            if first not in self.alive:
                return
            self.step()
        raise AssertionError("the first sequence starves")

    @invariant()
    def no_block_is_lost_or_shared_by_accident(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        held = [block for one in self.alive for block in one.blocks]
        assert len(set(held)) == self.pool.counts().in_use
        for one in self.alive:
            assert len(set(one.blocks)) == len(one.blocks)
            own = one.blocks[one.sealed :]
            assert all(held.count(block) == 1 for block in own), "an unsealed block is shared"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_decodes_are_not_held_up_by_a_long_prompt():
    """While a long prompt is computed in chunks, every step still serves the running answer."""
    scheduler = Scheduler(BlockPool(64), step_tokens=32, max_sequences=8)
    scheduler.add(sequence(0, 4))
    advance(scheduler)
    scheduler.add(sequence(1, 300))
    counts = []
    for _ in range(9):
        plan = scheduler.plan()
        counts.append([(work.sequence.key, work.count) for work in plan])
        advance(scheduler, plan)
    assert all((0, 1) in step for step in counts)
    assert counts[0] == [(0, 1), (1, 31)]


def test_prompts_are_admitted_in_the_order_of_arrival():
    """A short prompt does not overtake a long one that waits for blocks."""
    scheduler = Scheduler(BlockPool(8), step_tokens=256, max_sequences=8)
    for key, length in enumerate((90, 60, 5)):
        scheduler.add(sequence(key, length))
    assert [work.sequence.key for work in scheduler.plan()] == [0]


def test_a_full_hit_computes_the_last_token_and_writes_nothing():
    """A prompt that is found whole still has one row to compute; its blocks stay as they are."""
    scheduler = Scheduler(BlockPool(8), step_tokens=256, max_sequences=8)
    first, again = sequence(0, list(range(32))), sequence(1, list(range(32)))
    scheduler.add(first)
    advance(scheduler)
    scheduler.add(again)
    plan = {work.sequence: work.count for work in scheduler.plan()}
    assert plan[again] == 1
    assert again.blocks == first.blocks[:2]
    assert (again.computed, again.cached, again.sealed) == (31, 31, 2)


def test_a_hit_that_was_overwritten_after_preemption_is_not_stale():
    """What a preempted sequence gave up is found again only while it is still there."""
    pool = BlockPool(7)
    scheduler = Scheduler(pool, step_tokens=256, max_sequences=8)
    old, urgent = sequence(0, 64), sequence(1, 80, priority=-5)
    scheduler.add(old)
    advance(scheduler)
    scheduler.add(urgent)
    plan = scheduler.plan()
    assert [work.sequence for work in plan] == [urgent]
    assert len(old.blocks) == 1, "as much as was needed, and no more"
    assert (old.computed, old.sealed) == (16, 1)
    advance(scheduler, plan)
    scheduler.remove(urgent)
    advance(scheduler)
    assert old.blocks[0] not in old.blocks[1:]
    assert old.computed == 64 + 1
    pool.check()


def test_equal_prompts_that_come_together_are_computed_once():
    """Fifteen of sixteen copies wait for the first one's blocks and compute their own rest only."""
    scheduler = Scheduler(BlockPool(200), step_tokens=128, max_sequences=32)
    shared = list(range(512))
    copies = [sequence(key, [*shared, *[9000 + key] * 20]) for key in range(16)]
    for one in copies:
        scheduler.add(one)
    computed = 0
    while any(one.answer_tokens == 0 for one in copies):
        plan = scheduler.plan()
        computed += sum(work.count for work in plan if work.sequence.answer_tokens == 0)
        advance(scheduler, plan)
    assert computed == 512 + 16 * 20
    assert sorted(one.cached for one in copies) == [0] + [512] * 15


def test_a_prompt_does_not_wait_for_a_lower_class_to_compute_it():
    """Waiting for another's blocks must not turn the order of classes around."""
    scheduler = Scheduler(BlockPool(64), step_tokens=32, max_sequences=8)
    scheduler.add(sequence(0, list(range(320)), priority=5))
    advance(scheduler)
    scheduler.add(sequence(1, list(range(320)), priority=0))
    assert [work.sequence.key for work in scheduler.plan()] == [1]


def test_the_higher_class_pauses_the_lower_one_when_the_batch_is_full():
    """A full batch of background work does not make an urgent request wait for its end."""
    scheduler = Scheduler(BlockPool(64), step_tokens=64, max_sequences=1)
    slow = sequence(0, 20, priority=1)
    scheduler.add(slow)
    advance(scheduler)
    scheduler.add(sequence(1, 20, priority=0))
    assert [work.sequence.key for work in scheduler.plan()] == [1]
    assert len(slow.blocks) == 2, "it waits with its blocks"


def test_nobody_of_a_low_class_waits_for_ever():
    """Urgent requests keep coming; the background one still gets its turn, by its age."""
    scheduler = Scheduler(BlockPool(8), step_tokens=64, max_sequences=1)
    background = sequence(0, 8, priority=3, arrived=0.0)
    scheduler.add(background)
    key, now = 1, 0.0
    urgent = None
    while background.answer_tokens == 0:
        if urgent is None:
            urgent = sequence(key, 8, arrived=now)
            scheduler.add(urgent)
            key += 1
        advance(scheduler, scheduler.plan(now))
        if urgent.answer_tokens >= 1:
            scheduler.remove(urgent)
            urgent = None
        now += 1.0
        assert now < 300, "it starves"
    assert now > 30, "and yet it came behind its betters"


def test_earlier_deadlines_come_first_within_a_class():
    """Two prompts of one class: the one whose first token is due sooner is computed first."""
    scheduler = Scheduler(BlockPool(64), step_tokens=32, max_sequences=8)
    scheduler.add(sequence(0, 64, ttft_s=5.0))
    scheduler.add(sequence(1, 64, ttft_s=0.2))
    assert [work.sequence.key for work in scheduler.plan()] == [1]


@pytest.mark.parametrize(("target", "expected"), [(None, 511), (0.040, 127), (0.012, 18)])
def test_chunks_are_cut_to_what_running_answers_allow(target, expected):
    """The tightest target of a running answer and the cost table give the chunk, not a constant."""
    scheduler = Scheduler(BlockPool(99), step_tokens=512, max_sequences=8, costs=COSTS)
    talk = sequence(0, 4, tpot_s=target)
    scheduler.add(talk)
    advance(scheduler)
    talk.times.first_token = talk.times.last_token = 1.0
    scheduler.add(sequence(1, 900, ttft_s=60.0))
    chunk = max(work.count for work in scheduler.plan(now=1.0))
    assert chunk == expected


@pytest.mark.parametrize(
    ("priority", "ttft_s", "expected"), [(0, 60.0, 65), (0, 0.4, 86), (0, 0.1, 154), (1, 0.1, 65)]
)
def test_a_prompt_that_would_be_late_makes_steps_longer(priority, ttft_s, expected):
    """Up to two targets, by what it needs to be in time, and never for a class above its own."""
    scheduler = Scheduler(BlockPool(99), step_tokens=512, max_sequences=8, costs=COSTS)
    talk = sequence(0, 4, tpot_s=0.024)
    scheduler.add(talk)
    advance(scheduler)
    talk.times.first_token = talk.times.last_token = 1.0
    scheduler.add(sequence(1, 900, ttft_s=ttft_s, arrived=1.0, priority=priority))
    chunk = max(work.count for work in scheduler.plan(now=1.0))
    assert chunk == expected


def test_short_prompts_come_before_long_ones_but_not_for_ever():
    """A long prompt is passed by those that come while it would be computed, not by later ones."""
    scheduler = Scheduler(BlockPool(999), step_tokens=512, max_sequences=8, costs=COSTS)
    long = sequence(0, 2000, arrived=1.0)
    scheduler.add(long)
    advance(scheduler, scheduler.plan(now=1.0))
    assert 0.5 < long.alone_s < 0.7
    scheduler.add(sequence(1, 100, arrived=1.4))
    scheduler.add(sequence(2, 100, arrived=1.9))
    assert [work.sequence.key for work in scheduler.plan(now=1.9)] == [1, 0]


def test_a_long_prompt_that_is_known_already_counts_as_short():
    """What the pool holds is not computed: a conversation that goes on does not wait for long."""
    scheduler = Scheduler(BlockPool(999), step_tokens=4096, max_sequences=8, costs=COSTS)
    talk = list(range(1600))
    scheduler.add(sequence(0, talk))
    advance(scheduler)
    scheduler.add(sequence(1, 800))
    scheduler.add(sequence(2, [*talk, 7, 7, 7]))
    again, new = scheduler.waiting
    assert (again.key, new.key) == (2, 1)
    assert again.alone_s < 0.1 * new.alone_s


def test_a_short_prompt_waits_for_the_prefix_that_a_longer_one_computes():
    """It comes first by its length, and yet does not compute again what is on its way."""
    scheduler = Scheduler(BlockPool(999), step_tokens=256, max_sequences=8, costs=COSTS)
    shared = list(range(512))
    long = sequence(0, [*shared, *[7000] * 1500], arrived=1.0)
    short = sequence(1, [*shared, *[8000] * 10], arrived=1.1)
    scheduler.add(long)
    advance(scheduler, scheduler.plan(now=1.0))
    scheduler.add(short)
    computed = 0
    while not short.answer_tokens:
        plan = scheduler.plan(now=1.1)
        computed += sum(work.count for work in plan if work.sequence is short)
        advance(scheduler, plan)
    assert (computed, short.cached) == (10, 512)


def test_a_step_stays_short_also_where_nothing_runs():
    """Who arrives or leaves waits for the running step, so no prompt makes it last for seconds."""
    costs = StepCosts([1, 16, 128, 4096], [0.010, 0.030, 0.200, 6.400])
    scheduler = Scheduler(BlockPool(300), step_tokens=4096, max_sequences=8, costs=costs)
    scheduler.add(sequence(0, 4000))
    (work,) = scheduler.plan()
    assert 128 < work.count < 330
    assert costs.prefill_s(work.count) <= 0.5


def test_an_answer_that_is_ahead_lends_its_time_but_no_long_gap():
    """Mean speed is what the target is about; a single gap stays below three targets."""
    scheduler = Scheduler(BlockPool(99), step_tokens=1024, max_sequences=8, costs=COSTS)
    talk = sequence(0, 4, tpot_s=0.040)
    scheduler.add(talk)
    advance(scheduler)
    talk.tokens += [2] * 50
    talk.computed += 50
    talk.times.first_token, talk.times.last_token = 0.0, 0.5
    talk.blocks += scheduler.pool.take(blocks_for(len(talk.tokens)) - len(talk.blocks))
    scheduler.add(sequence(1, 900))
    chunk = max(work.count for work in scheduler.plan(now=0.5))
    assert 127 < chunk < 300
    assert COSTS.prefill_s(chunk) < 3 * 0.040


def test_a_prompt_makes_progress_beside_answers_that_are_late():
    """Nothing is allowed any more, and yet a chunk of the smallest size is computed."""
    scheduler = Scheduler(BlockPool(99), step_tokens=512, max_sequences=8, costs=COSTS)
    talk = sequence(0, 4, tpot_s=0.005)
    scheduler.add(talk)
    advance(scheduler)
    talk.times.first_token, talk.times.last_token = 0.0, 9.0
    scheduler.add(sequence(1, 900))
    scheduler.add(sequence(2, 900))
    assert [(work.sequence.key, work.count) for work in scheduler.plan(now=9.0)] == [
        (0, 1),
        (1, 16),
    ]
