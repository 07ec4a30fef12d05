"""The scheduler computes every token once its turn comes, within its budget, and loses no block."""

from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.kv import BLOCK_TOKENS, BlockPool, blocks_for
from runtime.scheduler import Scheduler
from runtime.sequence import Sampling, Sequence

GREEDY = Sampling(temperature=0, max_tokens=40)


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps and cancels in any order, on a pool that is often too small."""

    @initialize(blocks=st.integers(4, 20), step_tokens=st.integers(16, 80), batch=st.integers(1, 9))
    def start(self, blocks, step_tokens, batch):
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, step_tokens=step_tokens, max_sequences=batch)
        self.alive: list[Sequence] = []
        self.next_key = 0

    @rule(prompt=st.integers(1, 60))
    def arrive(self, prompt):
        room = self.pool.total * BLOCK_TOKENS
        sequence = Sequence(self.next_key, [1] * min(prompt, room - 1), GREEDY)
        self.next_key += 1
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        sequence = data.draw(st.sampled_from(self.alive))
        self.alive.remove(sequence)
        self.scheduler.remove(sequence)
        assert sequence.blocks == []

    @rule()
    def step(self):
        plan = self.scheduler.plan()
        assert bool(plan) == bool(self.alive), "work waits, so a step has work"
        assert sum(work.count for work in plan) <= self.scheduler.step_tokens
        assert len(plan) <= self.scheduler.max_sequences
        assert [w.count > 1 for w in plan] == sorted(w.count > 1 for w in plan), "decodes first"
        for work in plan:
            sequence = work.sequence
            assert 0 < work.count <= sequence.behind
            assert len(sequence.blocks) >= blocks_for(sequence.computed + work.count)
            catches_up = work.catches_up
            sequence.computed += work.count
            if catches_up:
                sequence.tokens.append(2)
                room = self.pool.total * BLOCK_TOKENS
                if sequence.answer_tokens >= 40 or len(sequence.tokens) >= room:
                    self.alive.remove(sequence)
                    self.scheduler.remove(sequence)

    @precondition(lambda self: self.alive)
    @rule()
    def the_oldest_always_ends(self):
        """However small the pool, the one that came first makes progress to its end."""
        oldest = min(self.alive, key=lambda one: one.key)
        for _ in range(400):
            if oldest not in self.alive:
                return
            self.step()
        raise AssertionError("the oldest sequence starves")

    @invariant()
    def no_block_is_lost_or_shared(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        held = [block for sequence in self.alive for block in sequence.blocks]
        assert len(held) == len(set(held)) == self.pool.counts().in_use


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_decodes_are_not_held_up_by_a_long_prompt():
    """While a long prompt is computed in chunks, every step still serves the running answer."""
    scheduler = Scheduler(BlockPool(64), step_tokens=32, max_sequences=8)
    talk = Sequence(0, [1] * 4, GREEDY)
    scheduler.add(talk)
    advance(scheduler)
    scheduler.add(Sequence(1, [1] * 300, GREEDY))
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
        scheduler.add(Sequence(key, [1] * length, GREEDY))
    assert [work.sequence.key for work in scheduler.plan()] == [0]


def advance(scheduler, plan=None):
    for work in plan or scheduler.plan():
        catches_up = work.catches_up
        work.sequence.computed += work.count
        if catches_up:
            work.sequence.tokens.append(2)
