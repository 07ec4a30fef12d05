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
from runtime.costs import StepCosts, pairs
from runtime.kv import BLOCK_TOKENS, blocks_for
from runtime.step_layout import SHORT_TOKENS, StepLayout

_REPEATS = 3
_DECODES = 8  # of the steps that show what context costs
_VERIFIED = ((1, 4), (4, 4), (1, 8))  # sequences and tokens of each, of steps that verify
_TURNS = 5
_WARM_SHARE = 0.1


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


def measure_span_s(model: Timed, *, timer: Callable[[], float] = perf_counter) -> float:
    """Seconds that a span of several tokens costs beside what as many decodes would, all rows being
    read; negative where it is cheaper."""
    more = []
    for sequences, count in _VERIFIED:
        tokens = sequences * count
        if tokens > model.blocks or count > model.context_tokens:
            continue
        spans = [Span(count, count, [at]) for at in range(sequences)]
        alone = [Span(count, 1, [at]) for at in range(tokens)]
        # In turns, and the least of each: what else runs on the machine only ever adds.
        times = [
            (_once(timer, model, spans), _once(timer, model, alone)) for _ in range(_TURNS + 1)
        ]
        together, apart = (min(column) for column in zip(*times[1:], strict=True))
        more.append((together - apart) / sequences)
    model.wipe(list(range(min(model.blocks, max(one * count for one, count in _VERIFIED)))))
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
