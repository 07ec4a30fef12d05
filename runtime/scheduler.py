"""Which tokens are computed next: one token budget a step, for decodes and prefill together.

Knows sequences and the block pool; knows no model, no sampling and no clock. One rule: every
sequence catches up with its own tokens. Decodes come first, then prompts in the order of arrival,
cut to what is left of the budget. When blocks run out, the youngest sequence gives its blocks back
and is computed again later.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from runtime.kv import BlockPool, OutOfBlocks, blocks_for
from runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """`count` tokens of one sequence to compute in this step."""

    sequence: Sequence
    count: int

    @property
    def catches_up(self) -> bool:
        """True when the step ends with this sequence's next token to sample."""
        return self.sequence.computed + self.count == len(self.sequence.tokens)


class Scheduler:
    """Waiting and running sequences, both in the order of arrival."""

    def __init__(self, pool: BlockPool, *, step_tokens: int, max_sequences: int) -> None:
        self.pool = pool
        self.step_tokens = step_tokens
        # A batch of decodes alone has to fit the budget, or the youngest would wait in mid-answer.
        self.max_sequences = min(max_sequences, step_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended or was cancelled; its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.give_back(sequence.forget_blocks())

    def plan(self) -> list[Work]:
        """The next step's work, decodes first; empty when there is nothing to do.

        Every sequence of the plan holds the blocks that its tokens need.
        """
        decodes = [one for one in self.running if one.behind == 1]
        # Without blocks: an older sequence took them a moment ago.
        plan = [Work(one, 1) for one in decodes if one.blocks and self._reserve(one)]
        budget = self.step_tokens - len(plan)
        behind = deque(one for one in self.running if one.behind > 1)
        while budget > 0:
            late = behind.popleft() if behind else self._admit()
            if late is None:
                break
            plan.append(Work(late, min(late.behind, budget)))
            budget -= plan[-1].count
        # A prompt of one token, or a chunk cut to one, is a decode to the attention kernel.
        return sorted(plan, key=lambda work: work.count > 1)

    def _reserve(self, sequence: Sequence) -> bool:
        """Makes room for one more token. False when the sequence itself had to give way."""
        missing = blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        while missing > 0:
            try:
                sequence.blocks += self.pool.take(missing)
                return True
            except OutOfBlocks:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.give_back(sequence.forget_blocks())
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self) -> Sequence | None:
        """Moves the sequence that has waited longest to the running ones, if it fits whole.

        One block for each running sequence stays free, so that decodes do not push it out again.
        """
        if not self.waiting or len(self.running) >= self.max_sequences:
            return None
        sequence = self.waiting[0]
        needed = blocks_for(len(sequence.tokens))
        if needed + len(self.running) > self.pool.free:
            return None
        sequence.blocks = self.pool.take(needed)
        self.waiting.popleft()
        insort(self.running, sequence, key=lambda one: one.key)
        return sequence
