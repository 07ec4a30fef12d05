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
from runtime.step_layout import StepLayout

_REPEATS = 3
_DECODES = 8  # of the steps that show what context costs
_VERIFIED = ((1, 4), (4, 4), (1, 8))  # sequences and tokens of each, of steps that verify


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
        left = ends - timer()
        if left < 2 * _REPEATS * seconds[-1]:
            break
        size *= 2
    decode_token_s = chunk_pair_s = 0.0
    if ends > timer():
        decode_token_s = _decode_token_s(timer, model, longest, max_sequences)
        chunk_pair_s = _chunk_pair_s(timer, model, longest, min(128, sizes[-1]))
    model.wipe(list(range(min(model.blocks, blocks_for(max(longest, step_tokens))))))
    return StepCosts(sizes, seconds, decode_token_s=decode_token_s, chunk_pair_s=chunk_pair_s)


def measure_span_s(
    model: Timed, costs: StepCosts, *, timer: Callable[[], float] = perf_counter
) -> float:
    """Seconds that a span of several tokens costs beside what its tokens would as decodes, every
    row of it being read; negative where it is cheaper."""
    more = []
    for sequences, count in _VERIFIED:
        if sequences > model.blocks or count > model.context_tokens:
            continue
        spans = [Span(count, count, [at]) for at in range(sequences)]
        size = StepSize(sequences * count, sequences * pairs(count, 0))
        whole = _timed(timer, model, spans, every_row=True)
        more.append((whole - costs.estimate(size)) / sequences)
    model.wipe(list(range(min(model.blocks, max(one for one, _ in _VERIFIED)))))
    return median(more) if more else 0.0


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


def _timed(
    timer: Callable[[], float], model: Timed, spans: list[Span], *, every_row: bool = False
) -> float:
    """Median seconds of a step with these spans, logits on the host included."""
    layout = lay_out(spans, model.device, model.scratch_slot)
    tokens = sum(span.count for span in spans)
    positions = [at for one in spans for at in range(one.context - one.count, one.context)]
    keep = [start + span.count - 1 for start, span in zip(layout.starts, spans, strict=True)]
    if every_row:
        keep = list(range(tokens))
    times = []
    for _ in range(_REPEATS):
        started = timer()
        model.forward([0] * tokens, positions, layout, keep).max().item()
        times.append(timer() - started)
    return median(times)
