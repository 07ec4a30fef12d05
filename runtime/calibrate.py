"""The first table of step costs: a few steps on an empty pool, timed.

Knows the model and the layout of steps; knows no sequences. Runs once, before there is work.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Protocol

import torch

from runtime.attention import Span, lay_out
from runtime.costs import StepCosts, StepSize, pairs
from runtime.kv import BLOCK_TOKENS, blocks_for
from runtime.step_layout import SHORT_TOKENS, StepLayout

_REPEATS = 3
_DECODES = 8  # of the steps that show what context costs
# Steps that verify guesses: so many sequences with so many tokens each, behind so many others.
_VERIFYING, _VERIFIED, _VERIFIED_CONTEXT = 4, (2, 8), 256
_TURNS = 3
_WARM_SHARE = 0.1
# What context costs is measured in the end, in this share of the time, as far as it goes.
_CONTEXT_SHARE = 0.3


class Timed(Protocol):
    """What is needed of a model."""

    @property
    def device(self) -> torch.device: ...
    @property
    def scratch_slot(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    def wipe(self, blocks: list[int]) -> None: ...
    def forward(
        self, ids: list[int], positions: list[int], layout: StepLayout, keep: list[int]
    ) -> torch.Tensor: ...


def measure_costs(
    model: Timed,
    step_tokens: int,
    max_sequences: int,
    *,
    budget_s: float,
    timer: Callable[[], float] = perf_counter,
) -> StepCosts:
    """Times steps of 1, 2, 4, ... tokens until `budget_s` is spent; beyond, cost grows evenly.

    Up to `max_sequences` tokens are decodes, more are one chunk. The pool's first blocks are used
    and zeroed again.
    """
    longest = min(model.context_tokens, model.blocks * BLOCK_TOKENS)
    ends = timer() + budget_s
    warm = timer() + _WARM_SHARE * budget_s
    while timer() < warm:  # the first steps of a process are slower than any later one
        _once(timer, model, _decodes(1, 1))
    sizes: list[int] = []
    seconds: list[float] = []
    size = 1
    while size <= step_tokens:
        decodes = size <= min(max_sequences, model.blocks)
        if not decodes and size > longest:
            break
        spans = _decodes(size, 1) if decodes else _chunk(size, 0)
        sizes.append(size)
        seconds.append(_timed(timer, model, spans))
        left = ends - _CONTEXT_SHARE * budget_s - timer()
        if left < 2 * _REPEATS * seconds[-1]:
            break
        size *= 2
    costs = StepCosts(sizes, seconds)

    def in_time(tokens: int) -> bool:
        return timer() + 3 * _REPEATS * costs.estimate(StepSize(tokens)) < ends

    if in_time(_DECODES):
        costs.decode_token_s = _decode_token_s(timer, model, longest, max_sequences)
    chunk = min(128, sizes[-1])
    if in_time(chunk):
        costs.chunk_pair_s = _chunk_pair_s(timer, model, longest, chunk)
    model.wipe(list(range(min(model.blocks, blocks_for(max(longest, step_tokens))))))
    return costs


def measure_guesses(
    model: Timed, costs: StepCosts, *, timer: Callable[[], float] = perf_counter
) -> None:
    """Adds to the costs what sequences that verify guesses cost beside what decodes do."""
    most = max(_VERIFIED)
    context = min(
        _VERIFIED_CONTEXT, model.context_tokens, model.blocks // _VERIFYING * BLOCK_TOKENS
    )
    if context < most:
        return
    steps = [_verifying(count, context) for count in (1, *_VERIFIED)]
    # In turns, and the least of each: what else runs on the machine only ever adds.
    times = [[_once(timer, model, spans) for spans in steps] for _ in range(_TURNS + 1)]
    plain_s, *seconds = (min(column) for column in zip(*times[1:], strict=True))
    model.wipe(list(range(_VERIFYING * blocks_for(context))))
    beside = []  # what each span takes beside its tokens
    for count, taken_s in zip(_VERIFIED, seconds, strict=True):
        tokens_s = costs.estimate(StepSize(_VERIFYING * count)) - costs.estimate(
            StepSize(_VERIFYING)
        )
        beside.append((taken_s - plain_s - tokens_s) / _VERIFYING)
    few, many = _VERIFIED
    slope_s = (beside[1] - beside[0]) / (many - few)
    costs.guess_token_s = max(0.0, slope_s / context)
    costs.span_s = max(0.0, beside[0] - max(0.0, slope_s) * (few - 1))


def _verifying(count: int, context: int) -> list[Span]:
    """Sequences that bring `count` tokens each, the last of them at `context`."""
    each = blocks_for(context)
    return [
        Span(context, count, list(range(one * each, (one + 1) * each))) for one in range(_VERIFYING)
    ]


def _decode_token_s(
    timer: Callable[[], float], model: Timed, longest: int, max_sequences: int
) -> float:
    """Seconds that one more token of context costs a decode."""
    batch = min(_DECODES, max_sequences, model.blocks)
    context = min(512, longest, model.blocks // batch * BLOCK_TOKENS)
    if context < 2 * BLOCK_TOKENS:
        return 0.0
    near, far = (
        _timed(timer, model, _decodes(batch, 1)),
        _timed(timer, model, _decodes(batch, context)),
    )
    return max(0.0, far - near) / (batch * (context - 1))


def _chunk_pair_s(timer: Callable[[], float], model: Timed, longest: int, count: int) -> float:
    """Seconds that one more query-key pair costs a chunk."""
    before = min(1024, longest - count)
    if count < 2 or before < BLOCK_TOKENS:
        return 0.0
    near, far = _timed(timer, model, _chunk(count, 0)), _timed(timer, model, _chunk(count, before))
    return max(0.0, far - near) / (pairs(count, before) - pairs(count, 0))


def _decodes(count: int, context: int) -> list[Span]:
    each = blocks_for(context)
    return [Span(context, 1, list(range(one * each, (one + 1) * each))) for one in range(count)]


def _chunk(count: int, before: int) -> list[Span]:
    return [Span(before + count, count, list(range(blocks_for(before + count))))]


def _timed(timer: Callable[[], float], model: Timed, spans: list[Span]) -> float:
    """Median seconds of a step with these spans, logits on the host included."""
    _once(timer, model, spans)  # the first of its size has to find its memory
    return median(_once(timer, model, spans) for _ in range(_REPEATS))


def _once(timer: Callable[[], float], model: Timed, spans: list[Span]) -> float:
    """Seconds of one step; of spans as short as those that verify every row is read."""
    layout = lay_out(spans, model.device, model.scratch_slot)
    tokens = sum(span.count for span in spans)
    positions = [at for one in spans for at in range(one.context - one.count, one.context)]
    keep = [start + span.count - 1 for start, span in zip(layout.starts, spans, strict=True)]
    if layout.longest <= SHORT_TOKENS:
        keep = list(range(tokens))
    started = timer()
    model.forward([0] * tokens, positions, layout, keep).max().item()
    return timer() - started
