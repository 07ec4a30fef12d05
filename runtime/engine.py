"""One loop in one thread: take orders, plan, forward, sample, hand out.

Knows the scheduler, the model, the sampler and the tokenizer; knows no HTTP and no event loop.
Others talk to it through `submit`, `cancel` and `stop`, which any thread may call, and hear from it
through `emit`, which the engine's thread calls once a step, and through `Listener`s.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence as Many
from dataclasses import replace
from heapq import heappop, heappush
from time import monotonic, perf_counter
from types import MappingProxyType

import torch

from cache.blocks import root_hash
from cache.tokens import Tokenizer
from runtime import sample
from runtime.account import Listener, Load, StepClock, StepRecord
from runtime.adapters import Adapter, adapter_rows
from runtime.adjust import adjusted
from runtime.attention import lay_out
from runtime.calibrate import measure_costs, measure_guesses
from runtime.costs import StepCosts, StepSize
from runtime.grammar import Grammars
from runtime.inbox import Inbox, Order, QueueFull
from runtime.kv import BLOCK_TOKENS, BlockPool, PoolWatcher
from runtime.logprobs import token_logprob
from runtime.model import Model
from runtime.packing import pack
from runtime.scheduler import Scheduler, Work, step_size
from runtime.scoring import score_prompt, scores_prompt
from runtime.sequence import Output, Reply, Sequence, Times
from runtime.shapes import FinishReason
from runtime.speculation import Speculation
from runtime.swap import Swap
from runtime.verification import Said, verify

log = logging.getLogger(__name__)


# An empty plan while sequences wait means that something else has to come first.
_IDLE_WAIT_S = 0.002
# The logits of scored prompts take this much memory at most in one step.
_SCORED_BYTES = 256 * 2**20


class Engine:
    """Continuous batching over one model. `emit` gets each step's outputs, in the engine's thread.

    `limit_tokens` is the longest prompt plus answer: what the model was trained for, what the pool
    holds and what the caller allows, whichever is least. Token ids are below `vocabulary`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        emit: Callable[[list[Output]], None],
        step_tokens: int = 512,
        max_sequences: int = 64,
        max_waiting: int = 1024,
        context_tokens: int | None = None,
        tpot_s: float | None = None,
        identity: str = "",
        adapters: Mapping[str, Adapter] = MappingProxyType({}),
        watchers: Many[PoolWatcher] = (),
        listeners: Many[Listener] = (),
        swap: Swap | None = None,
        speculation: Speculation | None = None,
        now: Callable[[], float] = monotonic,
        timer: Callable[[], float] = perf_counter,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.clock = StepClock()
        self.identity = identity  # of weights and their format: cached blocks are only theirs
        self.adapters = adapters
        self.now = now
        self._timer = timer  # of what steps cost
        self._emit = emit
        self._listeners = tuple(listeners)
        self.swap = swap  # ours to close
        self.speculation = speculation
        self._pool = BlockPool(
            model.blocks, [*watchers, *([swap.spill] if swap is not None else [])]
        )
        self.vocabulary = min(tokenizer.vocab_size, model.vocab_size)
        self.grammars = Grammars(tokenizer, self.vocabulary)
        self._scheduler = Scheduler(
            self._pool,
            step_tokens=step_tokens,
            max_sequences=max_sequences,
            scored_rows=max(BLOCK_TOKENS, _SCORED_BYTES // (4 * model.vocab_size)),
            tpot_s=tpot_s,
            below=swap,
        )
        self._max_waiting = max_waiting
        longest = min(model.context_tokens, self._pool.total * BLOCK_TOKENS)
        self.limit_tokens = min(longest, context_tokens or longest)
        self._inbox = Inbox()
        if swap is not None:
            swap.attach(self._pool, self._inbox.wake)
        self._deadlines: list[tuple[float, int]] = []  # a heap: when, key
        self._prompt_tokens = self._cached_tokens = self._refused = 0
        self._replies: dict[int, tuple[Sequence, Reply]] = {}

    def calibrate(self, budget_s: float = 1.0) -> StepCosts:
        """Measures what steps cost, before the first one: chunks are then cut to their targets."""
        assert not self._replies, "steps are measured before there is work"
        scheduler = self._scheduler
        costs = measure_costs(
            self.model,
            scheduler.step_tokens,
            scheduler.max_sequences,
            budget_s=budget_s,
            timer=self._timer,
        )
        scheduler.costs = costs
        if self.speculation is not None:
            measure_guesses(self.model, costs, timer=self._timer)
        if self.swap is not None:
            self.swap.costs = costs
            self.swap.measure()
        return costs

    # ---- any thread ------------------------------------------------------------------------------

    def submit(self, orders: Many[Order]) -> list[int]:
        """A key per order, in order. Raises QueueFull or EngineStopped, taking none."""
        arrived = self.now()
        made = [self._sequence(order, arrived) for order in orders]
        try:
            self._inbox.put(made, behind=len(self._scheduler.waiting), most=self._max_waiting)
        except QueueFull as error:
            self._refused += 1
            error.retry_s = self._drain_s(error.waiting)
            raise
        return [sequence.key for sequence in made]

    def _sequence(self, order: Order, arrived: float) -> Sequence:
        """Hashing a long prompt takes a while: it is done before anything is locked."""
        adapter = self.adapters[order.adapter].identity if order.adapter else None
        root = root_hash(model=self.identity, adapter=adapter, salt=order.salt)
        sequence = Sequence(
            -1,
            [*order.prompt, *order.begun] if order.begun else order.prompt,
            order.sampling,
            order.service,
            root,
            order.adapter,
            order.salt,
            Times(arrived),
            order.prediction,
            len(order.begun),
        )
        if order.track is not None:
            sequence.track, order.track.sequence = order.track, sequence
        return sequence

    def _drain_s(self, waiting: int) -> float:
        """About when a place of the full queue is free: the prompts before it, as they come."""
        costs, running = self._scheduler.costs, len(self._scheduler.running)
        if costs is None:
            return 1.0
        queue = list(self._scheduler.waiting)[:64]
        average = sum(one.prompt_tokens for one in queue) / max(1, len(queue))
        batch = max(1, running)
        answer_s = costs.estimate(StepSize(batch)) * 64 / batch  # a place costs its answer, too
        return (costs.prefill_s(math.ceil(average)) + answer_s) * max(1, waiting // 8)

    def forget_cached(self) -> None:
        """Before the next step, everything cached can no longer be found."""
        self._inbox.forget_cached()

    def cancel(self, keys: Many[int]) -> None:
        """Frees these sequences before the next step; unknown or ended ones are ignored."""
        self._inbox.cancel(keys)

    def stop(self) -> None:
        """Ends `run` after the current step; running sequences get no more output."""
        self._inbox.close()

    def check(self) -> None:
        """Raises AssertionError when a block is lost; call it while no step runs."""
        self._pool.check()

    def load(self) -> Load:
        """A snapshot for health answers; may be one step old."""
        scheduler = self._scheduler
        waiting_for = scheduler.waiting_for()
        waiting_for["capacity"] += len(self._inbox.orders)
        return Load(
            len(scheduler.running),
            sum(waiting_for.values()),
            self._pool.counts(),
            scheduler.preemptions,
            self._prompt_tokens,
            self._cached_tokens,
            self._pool.evictions,
            self._refused,
            waiting_for,
            scheduler.loads.asked_tokens,
            dict(scheduler.loads.hit_tokens),
        )

    # ---- the engine's thread ---------------------------------------------------------------------

    def run(self) -> None:
        """Steps while there is work, waits while there is none, until `stop`."""
        while self.take_orders(wait=True):
            outputs = self.step()
            if outputs:
                self._emit(outputs)
        for key in list(self._replies):
            self._forget(key, "abort")
        self._pool.check()
        if self.swap is not None:
            self.swap.close()

    def step(self) -> list[Output]:
        """One packed forward: what each sequence gained from it."""
        started, now = self._timer(), self.now()
        copied_s = self._copied_s()
        late = self._past_deadline(now)
        plan = self._scheduler.plan(now)
        if not plan:
            if self._replies:
                self._inbox.rest(_IDLE_WAIT_S)
            return late
        guessed_s = 0.0
        if self.speculation is not None:
            planned = self._timer()
            plan = self.speculation.extend(plan, self._scheduler)
            guessed_s = self._timer() - planned
            self.speculation.counts.seconds += guessed_s
        size, forward_s = step_size(plan), self.clock.forward_s  # before the plan is carried out
        try:
            outputs = self._advance(plan, *self._forward(plan))
        except Exception as error:  # whatever fails, the clients hear of it and the worker lives
            log.exception("a step with %d sequences failed", len(plan))
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return late + [self._fail(work.sequence, reason) for work in plan]
        seconds = self._timer() - started
        if self._scheduler.costs is not None:  # what tiers copied is not what its tokens cost
            beside_s = self._copied_s() - copied_s + guessed_s
            self._scheduler.costs.observe(size, seconds - beside_s)
        self._account(size, len(outputs), seconds, forward_s)
        return late + outputs

    def _account(self, size: StepSize, sampled: int, seconds: float, forward_before: float) -> None:
        """What the step took, for the clock and whoever listens."""
        clock = self.clock
        clock.steps += 1
        clock.tokens += sampled
        clock.step_s += seconds
        if self._listeners:
            record = StepRecord(size, seconds, clock.forward_s - forward_before)
            for listener in self._listeners:
                listener.stepped(record)

    def _copied_s(self) -> float:
        return 0.0 if self.swap is None else self.swap.copied_s

    def _past_deadline(self, now: float) -> list[Output]:
        """Gives up what has run out of its time."""
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, key = heappop(self._deadlines)
            if key in self._replies:
                sequence, _ = self._replies[key]
                reason = f"the deadline of {sequence.service.deadline_s} s has passed"
                outputs.append(self._fail(sequence, reason, code="deadline_exceeded"))
        return outputs

    def take_orders(self, *, wait: bool) -> bool:
        """Moves what came in to the scheduler. False once the engine is to stop."""
        news = self._inbox.take(wait=wait and not self._replies)
        for sequence in news.orders:
            self._replies[sequence.key] = (sequence, Reply(self.tokenizer, sequence))
            self._scheduler.add(sequence)
            if sequence.service.deadline_s is not None:
                due = sequence.times.arrived + sequence.service.deadline_s
                heappush(self._deadlines, (due, sequence.key))
        for key in news.cancels:
            if key in self._replies:
                self._forget(key, "abort")
        if news.clear:
            self._pool.clear()
        return news.going_on

    def _forward(self, plan: list[Work]) -> tuple[torch.Tensor, list[int]]:
        """Logits of the rows that are read, and per work the first of its rows in them."""
        packed = pack(plan)
        layout = lay_out(packed.spans, self.model.device, self.model.scratch_slot)
        if self.adapters:
            named = [work.sequence.adapter for work in plan]
            mine = [self.adapters[name] if name else None for name in named]
            layout.adapters = adapter_rows(mine, [work.count for work in plan], self.model.device)
        started = self._timer()
        logits = self.model.forward(packed.ids, packed.positions, layout, packed.keep)
        self.clock.forward_s += self._timer() - started
        return logits, packed.rows

    def _advance(self, plan: list[Work], logits: torch.Tensor, rows: list[int]) -> list[Output]:
        """Counts what was computed, samples for those that caught up, ends those that are done."""
        outputs: list[Output] = []
        sampled: list[Work] = []
        last_rows: list[int] = []
        guessing: list[Work] = []
        first_rows: list[int] = []
        for work, row in zip(plan, rows, strict=True):
            sequence = work.sequence
            unread = len(sequence.prompt) - sequence.computed
            if unread > 0:
                sequence.counts.prefilled += min(unread, work.count)
            if work.draft is not None:
                guessing.append(work)
                first_rows.append(row)
                continue
            catches_up = work.catches_up
            if scores_prompt(sequence):
                outputs += self._score_prompt(work, logits[row : row + work.count])
                row += work.count - 1
            sequence.computed += work.count
            if sequence.track is not None and sequence.times.first_token is None:
                sequence.track.chunk(self.now(), work.count)
            if sequence.key not in self._replies:
                continue  # a prompt that was only to be scored
            self._scheduler.seal(sequence)
            if catches_up:
                sampled.append(work)
                last_rows.append(row)
        if sampled:
            whole = last_rows == list(range(logits.shape[0]))
            chosen = logits if whole else logits[last_rows]
            outputs += self._sample([work.sequence for work in sampled], chosen)
        if guessing:
            outputs += self._verify(guessing, logits, first_rows)
        return outputs

    def _verify(self, works: list[Work], logits: torch.Tensor, starts: list[int]) -> list[Output]:
        """What sequences say that have guessed; `starts` are their first rows in logits [R, V]."""
        rows = [
            row
            for work, at in zip(works, starts, strict=True)
            for row in range(at, at + work.count)
        ]
        if rows != list(range(logits.shape[0])):
            logits = logits[rows]
        finite = sample.finite_rows(logits)
        if not all(finite):
            return self._part_spoiled_guesses(works, logits, finite)
        said = verify(works, logits)
        outputs: list[Output] = []
        now = self.now()
        speaking = [w.sequence for w, one in zip(works, said, strict=True) if one.reason is None]
        for listener in self._listeners:
            listener.sampled(speaking, now)
        for work, one in zip(works, said, strict=True):
            if one.reason is not None:
                outputs.append(self._fail(work.sequence, one.reason, "grammar_failed"))
            else:
                outputs += self._say_all(work, one, logits, now)
        return outputs

    def _straighten(self, sequence: Sequence, path: list[int]) -> None:
        """Brings what was computed for the accepted guesses of a tree behind the sequence's own."""
        if path == list(range(len(path))):
            return
        behind = len(sequence.tokens)
        slots = [
            [
                sequence.blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
                for at in range(behind, behind + count)
            ]
            for count in (path[-1] + 1, len(path))
        ]
        self.model.move([slots[0][number] for number in path], slots[1])

    def _say_all(self, work: Work, said: Said, logits: torch.Tensor, now: float) -> list[Output]:
        """A sequence says its accepted guesses and one token more, as far as it goes on."""
        sequence = work.sequence
        wanted = sequence.sampling.logprobs
        tops: list[sample.TopLogprobs | None] = [None] * len(said.tokens)
        if wanted is not None:
            tops = sample.top_logprobs(logits[said.rows], said.tokens, [wanted] * len(said.tokens))
        assert self.speculation is not None
        assert work.draft is not None
        proposer = self.speculation.settle(sequence, work.draft, len(said.path))
        self._straighten(sequence, said.path)
        sequence.computed += 1
        counts = sequence.counts
        counts.drafted += work.guesses
        outputs = []
        for number, (token, top) in enumerate(zip(said.tokens, tops, strict=True)):
            if number:
                sequence.computed += 1  # the guess before it was right
            if number < len(said.path):
                counts.accepted += 1
            else:
                counts.sampled += 1
            self._scheduler.seal(sequence)
            output = self._say(sequence, token, top, now)
            outputs.append(output)
            if output.finish_reason:
                break
        accepted, guessed = min(len(outputs), len(said.path)), work.guesses
        self.speculation.count(proposer, guessed, accepted)
        for listener in self._listeners:
            listener.guessed(guessed, accepted, len(outputs))
        if sequence.track is not None:
            sequence.track.guess(now, guessed, accepted)
        first = replace(outputs[0], accepted_tokens=accepted, rejected_tokens=guessed - accepted)
        return [first, *outputs[1:]]

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Output]:
        """logits [len(sequences), V] -> each sequence's next token and its effect."""
        finite = sample.finite_rows(logits)
        if not all(finite):
            return self._part_spoiled(sequences, logits, finite)
        changed, dead = adjusted(logits, [sequence.adjustment for sequence in sequences])
        if dead:
            return self._part_dead(sequences, logits, dead)
        samplings = [sequence.sampling for sequence in sequences]
        uniforms = [one.throw() for one in sequences]
        tokens = sample.sample(changed, samplings, uniforms)
        tops = sample.top_logprobs(logits, tokens, [one.logprobs for one in samplings])
        outputs = []
        now = self.now()
        for listener in self._listeners:
            listener.sampled(sequences, now)
        for sequence, token, top in zip(sequences, tokens, tops, strict=True):
            sequence.counts.sampled += 1
            outputs.append(self._say(sequence, token, top, now))
        return outputs

    def _say(
        self, sequence: Sequence, token: int, top: sample.TopLogprobs | None, now: float
    ) -> Output:
        """One token more, and its effect; its sequence may end by it."""
        sequence.tokens.append(token)
        times = sequence.times
        times.last_token = now
        if times.first_token is None:
            times.first_token = now
            self._prompt_tokens += sequence.prompt_tokens
            self._cached_tokens += sequence.cached
        if sequence.adjustment is not None:
            sequence.adjustment.push(token)
        reply = self._replies[sequence.key][1]
        entry = token_logprob(self.tokenizer, token, top, reply.chars) if top else None
        output = reply.push(token, entry)
        if output.finish_reason:
            self._forget(sequence.key, output.finish_reason)
        return output

    def _part_spoiled(
        self, sequences: list[Sequence], logits: torch.Tensor, finite: list[bool]
    ) -> list[Output]:
        """Ends the sequences whose logits are not finite; nothing of them stays in the pool."""
        outputs = []
        for sequence, good in zip(sequences, finite, strict=True):
            if not good:
                self.model.wipe(self._scheduler.distrust(sequence))
                outputs.append(self._fail(sequence, "the model gave logits that are not finite"))
        rest = [row for row, good in enumerate(finite) if good]
        if rest:
            outputs += self._sample([sequences[row] for row in rest], logits[rest])
        return outputs

    def _part_spoiled_guesses(
        self, works: list[Work], logits: torch.Tensor, finite: list[bool]
    ) -> list[Output]:
        """The same for sequences that have guessed, logits [sum of their counts, V]."""
        outputs: list[Output] = []
        good: list[Work] = []
        starts: list[int] = []
        at = 0
        for work in works:
            if all(finite[at : at + work.count]):
                good.append(work)
                starts.append(at)
            else:
                self.model.wipe(self._scheduler.distrust(work.sequence))
                why = "the model gave logits that are not finite"
                outputs.append(self._fail(work.sequence, why))
            at += work.count
        return outputs + (self._verify(good, logits, starts) if good else [])

    def _part_dead(
        self, sequences: list[Sequence], logits: torch.Tensor, dead: dict[int, str]
    ) -> list[Output]:
        """Ends the sequences whose grammar allows no token; samples the others."""
        code = "grammar_failed"
        outputs = [self._fail(sequences[row], why, code) for row, why in dead.items()]
        rest = [row for row in range(len(sequences)) if row not in dead]
        if rest:
            outputs += self._sample([sequences[row] for row in rest], logits[rest])
        return outputs

    def _score_prompt(self, work: Work, logits: torch.Tensor) -> list[Output]:
        """What this chunk's rows, logits [count, V], say of the prompt: an output without a token.
        A prompt that asks for no answer ends here."""
        sequence = work.sequence
        reply = self._replies[sequence.key][1]
        entries = score_prompt(sequence, work.count, logits, reply, self.tokenizer)
        done = sequence.sampling.max_tokens == 0 and work.catches_up
        if done:
            self._forget(sequence.key, "length")
        if not entries and not done:
            return []
        reason: FinishReason | None = "length" if done else None
        cached = sequence.cached
        return [Output(sequence.key, "", (), tuple(entries), reason, cached_tokens=cached)]

    def _fail(self, sequence: Sequence, reason: str, code: str = "engine_error") -> Output:
        """An end without an answer, also for a sequence that ended in the step that failed."""
        if sequence.key in self._replies:
            self._forget(sequence.key, "deadline" if code == "deadline_exceeded" else "error")
        return Output(sequence.key, "", (), (), "length", error=reason, error_code=code)

    def _forget(self, key: int, why: str) -> None:
        sequence, _ = self._replies.pop(key)
        sequence.counts.computed = sequence.computed
        self._scheduler.remove(sequence)
        if self.speculation is not None:
            self.speculation.end(sequence)
        for listener in self._listeners:
            listener.ended(sequence, why, self.now())
