"""Which tokens are computed next: one token budget a step, for decodes and prefill together.

Knows sequences, the block pool and what steps cost; knows no model and no sampling. One rule: every
sequence catches up with its own tokens. Decodes come first, then prompts in chunks, in the order of
`Sequence.rank`: priority, due time, age. What is known already is not computed: a prompt begins
with the blocks that the pool finds, and waits for those that another one is just computing. When
blocks run out, whoever comes last gives up as much of its tail as is needed, and catches up later.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import islice

from runtime.costs import StepCosts, StepSize, pairs
from runtime.kv import BLOCK_TOKENS, BlockPool, blocks_for
from runtime.loads import Below, Coming, Loads
from runtime.pace import step_s
from runtime.sequence import Sequence
from spec_decode.draft import Draft

# A chunk is never cut smaller than this for the sake of running answers, or a prompt would starve.
CHUNK_TOKENS_MIN = 16
# So many prompts are looked at to tell how pressing they are; those behind them are due later.
PRESSING_MAX = 16


@dataclass(frozen=True, slots=True)
class Work:
    """`count` tokens of one sequence to compute in this step, those of `draft` among them."""

    sequence: Sequence
    count: int
    draft: Draft | None = None

    @property
    def guesses(self) -> int:
        """Tokens at its end that the sequence does not have yet, and perhaps never will."""
        return 0 if self.draft is None else len(self.draft.ids)

    @property
    def catches_up(self) -> bool:
        """True when the step ends with this sequence's next token to sample."""
        return self.sequence.computed + self.count - self.guesses == len(self.sequence.tokens)


def step_size(plan: list[Work]) -> StepSize:
    """What a plan costs by: see `runtime.costs`."""
    tokens = decode_context = chunk_pairs = spans = guess_context = 0
    for work in plan:
        tokens += work.count
        if work.count == 1:
            decode_context += work.sequence.computed + 1
        elif work.draft is not None:
            decode_context += work.sequence.computed + 1
            spans += 1
            guess_context += pairs(work.guesses, work.sequence.computed + 1)
        else:
            chunk_pairs += pairs(work.count, work.sequence.computed)
    return StepSize(tokens, decode_context, chunk_pairs, spans, guess_context)


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank


class Scheduler:
    """Waiting and running sequences, both by rank. A waiting one may hold blocks: it ran before."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        step_tokens: int,
        max_sequences: int,
        scored_rows: int | None = None,
        costs: StepCosts | None = None,
        tpot_s: float | None = None,
        below: Below | None = None,
    ) -> None:
        self.pool = pool
        self.loads = Loads(pool, below)
        self.step_tokens = step_tokens
        # A batch of decodes alone has to fit the budget, or the youngest would wait in mid-answer.
        self.max_sequences = min(max_sequences, step_tokens)
        self.scored_rows = scored_rows or step_tokens
        self.costs = costs
        self.tpot_s = tpot_s  # of answers that name no target of their own
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._making: dict[bytes, Sequence] = {}  # hash -> who is about to compute that block
        self._on: set[int] = set()  # keys of the running ones

    def add(self, sequence: Sequence) -> None:
        if self.costs is not None:
            found = len(self.pool.match(sequence.hashes)) * BLOCK_TOKENS
            sequence.alone_s = self.costs.prefill_s(sequence.prompt_tokens - found, found)
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended or was cancelled; its blocks are free at once."""
        if self._runs(sequence):
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        self.loads.leave(sequence)
        self.pool.give_back(sequence.cut_blocks(0))

    def waiting_for(self) -> dict[str, int]:
        """How many sequences wait, by what for: room, a prefix that another one computes, blocks on
        their way from a tier, or to go on after a preemption. Any thread may ask."""
        counts = dict.fromkeys(("capacity", "prefix", "tier", "preempted"), 0)
        for one in list(self.waiting):
            counts[one.waits_for if one.times.admitted is None else "preempted"] += 1
        return counts

    def plan(self, now: float = 0.0) -> list[Work]:
        """The next step's work, decodes first; empty when there is nothing to do.

        Every sequence of the plan holds the blocks that its tokens need.
        """
        # Whoever is reserved for can push out those that come after it, so each is asked again.
        decodes = [one for one in self.running if one.behind == 1]
        plan = [Work(one, 1) for one in decodes if self._runs(one) and self._reserve(one)]
        budget = self.step_tokens - len(plan)
        nobody_behind = not self.waiting and len(decodes) == len(self.running)
        if budget <= 0 or nobody_behind:
            return plan
        self._plan_chunks(plan, budget, now)
        # Who was admitted may have pushed out a decode of a lower class.
        plan = [work for work in plan if self._runs(work.sequence)]
        # A prompt of one token, or a chunk cut to one, is a decode to the attention kernel.
        return sorted(plan, key=lambda work: work.count > 1)

    def look_ahead(self, sequence: Sequence, guesses: int) -> int:
        """How many guesses have room behind a running sequence's tokens, its blocks taken.

        Nobody gives way for them, and what running sequences may need next stays free.
        """
        missing = blocks_for(len(sequence.tokens) + guesses) - len(sequence.blocks)
        spare = max(0, self.pool.available - len(self.running))
        if missing > 0 and spare > 0:
            sequence.blocks += self.pool.take(min(missing, spare))
        return min(guesses, len(sequence.blocks) * BLOCK_TOKENS - len(sequence.tokens))

    def seal(self, sequence: Sequence) -> None:
        """Lets others find the blocks that the last step has filled."""
        blocks, keys = sequence.newly_full()
        if blocks:
            self.pool.seal(blocks, keys)
            self._stop_making(sequence, [key.hash for key in keys])

    def distrust(self, sequence: Sequence) -> list[int]:
        """Blocks of a sequence whose values went wrong: unfindable now; those that are its own."""
        self.loads.distrust([one for one in map(self.pool.hash_of, sequence.blocks) if one])
        self.pool.unseal(sequence.blocks)
        return [block for block in sequence.blocks if not self.pool.shared(block)]

    # ---- how much --------------------------------------------------------------------------------

    def _plan_chunks(self, plan: list[Work], budget: int, now: float) -> None:
        """Adds chunks by rank until the step is full, by tokens or by the time that it may take."""
        allowed_s = self._step_s(plan, now)
        self.loads.begin_step(allowed_s)
        least = CHUNK_TOKENS_MIN
        for late in self._behind(now):
            if self._is_being_filled(late):
                continue
            count = min(late.behind, budget)
            if late.needed_from < late.prompt_tokens - 1:
                count = min(count, self.scored_rows)
            if self.costs is not None:
                beside = step_size(plan)
                fits = self.costs.largest_chunk(allowed_s, beside, late.computed, count)
                count = max(fits, min(least, count))
            if count == 0:
                return
            plan.append(Work(late, count))
            budget -= count
            least = 0
            if budget <= 0:
                return

    def _step_s(self, plan: list[Work], now: float) -> float:
        """How long this step may take; the decodes of `plan` are in it already."""
        decodes_s = self.costs.estimate(step_size(plan)) if self.costs is not None else 0.0
        running = [one for one in self.running if one.behind > 1]
        behind = islice(merge(running, self.waiting, key=_rank), PRESSING_MAX)
        return step_s(self.running, behind, now, decodes_s=decodes_s, tpot_s=self.tpot_s)

    # ---- who -------------------------------------------------------------------------------------

    def _behind(self, now: float) -> Iterator[Sequence]:
        """Running and waiting sequences that are behind, by rank; a waiting one is admitted first.

        Where one finds no room, nobody who comes later may take what it waits for.
        """
        behind = [one for one in self.running if one.behind > 1]
        left, full = len(behind), False
        for one in merge(behind, list(self.waiting), key=_rank):
            if self._runs(one):
                left -= 1
                yield one
            elif not full:
                admitted = self._admit(one, now)
                full = admitted is None
                if admitted:
                    yield one
            if full and left <= 0:
                return

    def _admit(self, sequence: Sequence, now: float) -> bool | None:
        """Moves a waiting sequence to the running ones, with the blocks of all its tokens.

        False when it had better wait for blocks that another one is computing or that are being
        loaded, None when there is no room. One block for each running sequence stays free, so that
        decodes do not push it out again.
        """
        held = len(sequence.blocks)
        found: list[int] = []
        below = 0
        if held == sequence.sealed:  # a block that is begun but not full goes on where it stands
            end = min(len(sequence.hashes), blocks_for(sequence.needed_from + 1))
            found = self.pool.match(sequence.hashes[held:end])
            sequence.waits_for = "capacity"
            if self._is_made_by_another(sequence, held + len(found)):
                sequence.waits_for = "prefix"
                return False
            ready = self.loads.ready(sequence, held + len(found), end)
            if ready is None:
                sequence.waits_for = "tier"
                return False
            below = ready
        if len(self.running) >= self.max_sequences and not self._pause_for(sequence):
            return None
        self.pool.hold(found)
        sequence.blocks += found
        missing = max(0, blocks_for(len(sequence.tokens)) - len(sequence.blocks))
        if not self._make_room(missing + len(self.running), sequence, of_all=False):
            self.pool.give_back(sequence.cut_blocks(held))
            return None
        if found:
            sequence.sealed = len(sequence.blocks)
            sequence.computed = min(sequence.sealed * BLOCK_TOKENS, sequence.needed_from)
        coming = Coming(
            held, len(found), held + len(found) + below, sequence.times.admitted is None
        )
        data = self.loads.fetch(sequence, coming)
        sequence.blocks += self.pool.take(missing)
        if coming.first:
            sequence.times.admitted = now
        self.loads.fill(sequence, coming, data)
        for one in sequence.hashes[sequence.sealed :]:
            self._making.setdefault(one, sequence)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_rank)
        self._on.add(sequence.key)
        return True

    def _is_being_filled(self, sequence: Sequence) -> bool:
        """True while there is more to come from below than this step has time for."""
        before = sequence.sealed
        more = self.loads.more(sequence)
        self._stop_making(sequence, sequence.hashes[before : sequence.sealed])
        return more

    def _is_made_by_another(self, sequence: Sequence, at: int) -> bool:
        """True when somebody who comes first is computing block `at` of this sequence."""
        if at >= len(sequence.hashes) or sequence.needed_from < at * BLOCK_TOKENS:
            return False
        maker = self._making.get(sequence.hashes[at])
        return maker is not None and maker.seniority < sequence.seniority

    def _stop_making(self, sequence: Sequence, hashes: Iterable[bytes]) -> None:
        for one in hashes:
            if self._making.get(one) is sequence:
                del self._making[one]

    # ---- making room -----------------------------------------------------------------------------

    def _runs(self, sequence: Sequence) -> bool:
        """False for one that waits, perhaps since a moment ago."""
        return sequence.key in self._on

    def _reserve(self, sequence: Sequence) -> bool:
        """Makes room for one more token. False when the sequence itself had to give way."""
        if len(sequence.tokens) <= len(sequence.blocks) * BLOCK_TOKENS:
            return True
        missing = blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        if not self._make_room(missing, sequence, of_all=True):
            self._preempt(sequence)
            return False
        sequence.blocks += self.pool.take(missing)
        return True

    def _make_room(self, wanted: int, sequence: Sequence, *, of_all: bool) -> bool:
        """True when `wanted` blocks are to be had, if need be from those that come last.

        A running answer takes them `of_all` that come after it. One that is to begin takes them of
        those that wait, and of running ones of a lower class: in its own, who runs goes on.
        """
        if self.pool.available >= wanted:
            return True
        victims = [one for one in self.waiting if one.blocks] + [
            one
            for one in self.running
            if of_all or one.service.priority > sequence.service.priority
        ]
        victims = sorted((one for one in victims if one.rank > sequence.rank), key=_rank)
        if self.pool.available + sum(len(one.blocks) for one in victims) < wanted:
            return False
        while victims and self.pool.available < wanted:
            self._give_up_tail(victims.pop(), wanted)
        return self.pool.available >= wanted

    def _give_up_tail(self, victim: Sequence, wanted: int) -> None:
        """Takes blocks off the end of a sequence until `wanted` are available."""
        if self._runs(victim):
            self._preempt(victim)
        while victim.blocks and self.pool.available < wanted:
            self.pool.give_back(victim.cut_blocks(len(victim.blocks) - 1))

    def _pause_for(self, sequence: Sequence) -> bool:
        """Makes the last of a lower class wait, with its blocks, when the batch is full."""
        last = self.running[-1]
        if last.service.priority <= sequence.service.priority or last.rank < sequence.rank:
            return False
        self._preempt(last)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.preemptions += 1
        sequence.preemptions += 1
        insort(self.waiting, sequence, key=_rank)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._on.discard(sequence.key)
        self._stop_making(sequence, sequence.hashes)
        self.loads.end(sequence)
