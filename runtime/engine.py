"""One loop in one thread: take orders, plan, forward, sample, hand out.

Knows the scheduler, the model, the sampler and the tokenizer; knows no HTTP and no event loop.
Others talk to it through `submit`, `cancel` and `stop`, which any thread may call, and hear from it
through `emit`, which the engine's thread calls once a step.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence as Many
from dataclasses import dataclass, field
from time import perf_counter

import torch

from cache.tokens import Tokenizer
from runtime import sample
from runtime.attention import Span, lay_out
from runtime.kv import BLOCK_TOKENS, BlockCounts, BlockPool
from runtime.logprobs import token_logprob
from runtime.model import Model
from runtime.scheduler import Scheduler, Work
from runtime.sequence import Output, Reply, Sampling, Sequence
from runtime.shapes import FinishReason, TokenLogprob

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many sequences wait as the policy allows; nothing was taken."""


class EngineStopped(Exception):
    """The engine takes no more orders."""


@dataclass(frozen=True, slots=True)
class Order:
    """A prompt to continue; several of one request are submitted together."""

    prompt: Many[int]
    sampling: Sampling


@dataclass(slots=True)
class StepClock:
    """Seconds spent since the start; `step_s - forward_s` is what the engine itself costs."""

    steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    running: int
    waiting: int
    blocks: BlockCounts
    preemptions: int


@dataclass(slots=True)
class _Inbox:
    """Orders and cancellations on their way to the engine's thread."""

    ready: threading.Condition = field(default_factory=threading.Condition)
    orders: deque[Sequence] = field(default_factory=deque)
    cancels: deque[int] = field(default_factory=deque)
    open: bool = True


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
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.clock = StepClock()
        self._emit = emit
        self._pool = BlockPool(model.blocks)
        self._scheduler = Scheduler(
            self._pool, step_tokens=step_tokens, max_sequences=max_sequences
        )
        self._max_waiting = max_waiting
        longest = min(model.context_tokens, self._pool.total * BLOCK_TOKENS)
        self.limit_tokens = min(longest, context_tokens or longest)
        self.vocabulary = min(tokenizer.vocab_size, model.vocab_size)
        self._inbox = _Inbox()
        self._replies: dict[int, tuple[Sequence, Reply]] = {}
        self._next_key = 0

    # ---- any thread ------------------------------------------------------------------------------

    def submit(self, orders: Many[Order]) -> list[int]:
        """A key per order, in order. Raises QueueFull or EngineStopped, taking none."""
        inbox = self._inbox
        with inbox.ready:
            if not inbox.open:
                raise EngineStopped("the engine is stopping")
            waiting = len(inbox.orders) + len(self._scheduler.waiting)
            if waiting and waiting + len(orders) > self._max_waiting:
                raise QueueFull(f"{waiting} requests wait already")
            keys = []
            for order in orders:
                keys.append(self._next_key)
                inbox.orders.append(Sequence(self._next_key, order.prompt, order.sampling))
                self._next_key += 1
            inbox.ready.notify()
        return keys

    def cancel(self, keys: Many[int]) -> None:
        """Frees these sequences before the next step; unknown or ended ones are ignored."""
        with self._inbox.ready:
            self._inbox.cancels.extend(keys)
            self._inbox.ready.notify()

    def stop(self) -> None:
        """Ends `run` after the current step; running sequences get no more output."""
        with self._inbox.ready:
            self._inbox.open = False
            self._inbox.ready.notify()

    def load(self) -> Load:
        """A snapshot for health answers; may be one step old."""
        scheduler = self._scheduler
        waiting = len(scheduler.waiting) + len(self._inbox.orders)
        return Load(len(scheduler.running), waiting, self._pool.counts(), scheduler.preemptions)

    # ---- the engine's thread ---------------------------------------------------------------------

    def run(self) -> None:
        """Steps while there is work, waits while there is none, until `stop`."""
        while self.take_orders(wait=True):
            outputs = self.step()
            if outputs:
                self._emit(outputs)
        for key in list(self._replies):
            self._forget(key)
        self._pool.check()

    def step(self) -> list[Output]:
        """One packed forward: what each sequence gained from it."""
        started = perf_counter()
        plan = self._scheduler.plan()
        if not plan:
            assert not self._replies, "sequences wait but none can run"
            return []
        try:
            outputs = self._advance(plan, *self._forward(plan))
        except Exception as error:  # whatever fails, the clients hear of it and the worker lives
            log.exception("a step with %d sequences failed", len(plan))
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return [self._fail(work.sequence, reason) for work in plan]
        clock = self.clock
        clock.steps += 1
        clock.tokens += len(outputs)
        clock.step_s += perf_counter() - started
        return outputs

    def take_orders(self, *, wait: bool) -> bool:
        """Moves what came in to the scheduler. False once the engine is to stop."""
        inbox = self._inbox
        with inbox.ready:
            while wait and inbox.open and not (inbox.orders or inbox.cancels or self._replies):
                inbox.ready.wait()
            orders, cancels = list(inbox.orders), list(inbox.cancels)
            inbox.orders.clear()
            inbox.cancels.clear()
            going_on = inbox.open
        for sequence in orders:
            self._replies[sequence.key] = (sequence, Reply(self.tokenizer, sequence))
            self._scheduler.add(sequence)
        for key in cancels:
            if key in self._replies:
                self._forget(key)
        return going_on

    def _forward(self, plan: list[Work]) -> tuple[torch.Tensor, list[int]]:
        """Logits of the rows that are read, and per work the first of its rows in them."""
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        rows: list[int] = []
        spans = []
        for work in plan:
            sequence, first = work.sequence, work.sequence.computed
            end = first + work.count
            start = len(ids)
            spans.append(Span(end, work.count, sequence.blocks))
            ids += sequence.tokens[first:end]
            positions += range(first, end)
            rows.append(len(keep))
            if _scores_prompt(sequence):
                keep += range(start, start + work.count)
            else:
                keep.append(start + work.count - 1)
        layout = lay_out(spans, self.model.device)
        started = perf_counter()
        logits = self.model.forward(ids, positions, layout, keep)
        self.clock.forward_s += perf_counter() - started
        return logits, rows

    def _advance(self, plan: list[Work], logits: torch.Tensor, rows: list[int]) -> list[Output]:
        """Counts what was computed, samples for those that caught up, ends those that are done."""
        outputs: list[Output] = []
        sampled: list[Work] = []
        last_rows: list[int] = []
        for work, row in zip(plan, rows, strict=True):
            sequence = work.sequence
            catches_up = work.catches_up
            if _scores_prompt(sequence):
                outputs += self._score_prompt(work, logits[row : row + work.count])
                row += work.count - 1
            sequence.computed += work.count
            if catches_up and sequence.key in self._replies:
                sampled.append(work)
                last_rows.append(row)
        if sampled:
            whole = last_rows == list(range(logits.shape[0]))
            chosen = logits if whole else logits[last_rows]
            outputs += self._sample([work.sequence for work in sampled], chosen)
        return outputs

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Output]:
        """logits [len(sequences), V] -> each sequence's next token and its effect."""
        finite = sample.finite_rows(logits)
        if not all(finite):
            return self._part_spoiled(sequences, logits, finite)
        samplings = [sequence.sampling for sequence in sequences]
        uniforms = [one.rng.random() if one.rng else None for one in sequences]
        tokens = sample.sample(logits, samplings, uniforms)
        tops = sample.top_logprobs(logits, tokens, [one.logprobs for one in samplings])
        outputs = []
        for sequence, token, top in zip(sequences, tokens, tops, strict=True):
            sequence.tokens.append(token)
            reply = self._replies[sequence.key][1]
            entry = token_logprob(self.tokenizer, token, top, reply.chars) if top else None
            output = reply.push(token, entry)
            if output.finish_reason:
                self._forget(sequence.key)
            outputs.append(output)
        return outputs

    def _part_spoiled(
        self, sequences: list[Sequence], logits: torch.Tensor, finite: list[bool]
    ) -> list[Output]:
        """Ends the sequences whose logits are not finite; nothing of them stays in the pool."""
        outputs = []
        for sequence, good in zip(sequences, finite, strict=True):
            if not good:
                self.model.wipe(sequence.blocks)
                outputs.append(self._fail(sequence, "the model gave logits that are not finite"))
        rest = [row for row, good in enumerate(finite) if good]
        if rest:
            outputs += self._sample([sequences[row] for row in rest], logits[rest])
        return outputs

    def _score_prompt(self, work: Work, logits: torch.Tensor) -> list[Output]:
        """Log-probabilities of the prompt tokens that this chunk's rows predict; logits [count, V].

        They come as outputs without a token. A prompt that asks for no answer ends here.
        """
        sequence, first = work.sequence, work.sequence.computed
        sampling = sequence.sampling
        # Row i predicts token first + i + 1; what a recomputation predicts again was sent before.
        wanted = range(
            max(first + 1, sequence.prompt_scored),
            min(first + work.count + 1, sequence.prompt_tokens),
        )
        targets = [sequence.tokens[at] for at in wanted]
        entries: list[TokenLogprob] = []
        reply = self._replies[sequence.key][1]

        def score(token: int, top: sample.TopLogprobs | None) -> None:
            offset = reply.prompt_offset(token)
            entries.append(token_logprob(self.tokenizer, token, top, offset))

        if sequence.prompt_scored == 0:
            score(sequence.tokens[0], None)
            sequence.prompt_scored = 1
        if targets:
            scored = logits[wanted.start - first - 1 : wanted.stop - first - 1]
            counts = [sampling.logprobs or 0] * len(targets)
            tops = sample.top_logprobs(scored, targets, counts)
            for target, top in zip(targets, tops, strict=True):
                score(target, top)
            sequence.prompt_scored = wanted.stop
        done = sampling.max_tokens == 0 and work.catches_up
        if done:
            self._forget(sequence.key)
        reason: FinishReason | None = "length" if done else None
        return [Output(sequence.key, "", (), tuple(entries), reason)] if entries or done else []

    def _fail(self, sequence: Sequence, reason: str) -> Output:
        """An end without an answer, also for a sequence that ended in the step that failed."""
        if sequence.key in self._replies:
            self._forget(sequence.key)
        return Output(sequence.key, "", (), (), "length", error=reason)

    def _forget(self, key: int) -> None:
        sequence, _ = self._replies.pop(key)
        self._scheduler.remove(sequence)


def _scores_prompt(sequence: Sequence) -> bool:
    """True while the next chunk's rows predict prompt tokens that somebody asked about."""
    return sequence.sampling.prompt_logprobs and sequence.computed < sequence.prompt_tokens
