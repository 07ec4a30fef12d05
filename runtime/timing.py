"""Which of several layers is fastest on this machine, by a short measurement.

Knows layers as modules; knows no formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter

import torch

from runtime.linear import PackedLinear

# Tokens of the steps that layers are compared in.
_STEPS = (1, 8, 64)
# What is chosen stays (`runtime.choices`); of 3 runs the best one chose otherwise twice as often.
_REPEATS = 9
# Another layer must be this much faster than one that stands before it: below lies noise.
_CLEARLY = 0.93
# More than any CPU's cache: between two runs a layer's weights are not in it, as in a large model.
_FLUSH_BYTES = 2**26


def fastest(
    layers: Sequence[PackedLinear],
    dtypes: Sequence[torch.dtype],
    *,
    clearly: float = _CLEARLY,
) -> int:
    """The number of the fastest layer, each with inputs of its dtype; earlier ones win ties.

    Another layer wins when it takes less than `clearly` of the time.
    """
    scores = [_mean(times) for times in _times(layers, dtypes)]
    best = 0
    for at, score in enumerate(scores):
        if score < scores[best] * clearly:
            best = at
    return best


@torch.inference_mode()
def _times(layers: Sequence[PackedLinear], dtypes: Sequence[torch.dtype]) -> list[list[float]]:
    """Seconds of each layer at each number of tokens; the best of a few runs, taken in turns."""
    large = layers[0].in_features * layers[0].out_features > _FLUSH_BYTES // 32
    flush = torch.zeros(_FLUSH_BYTES // 4 if large else 0)
    best = [[math.inf] * len(_STEPS) for _ in layers]
    for step, tokens in enumerate(_STEPS):
        inputs = [torch.randn(tokens, layers[0].in_features).to(dtype) for dtype in dtypes]
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
        for _ in range(_REPEATS):
            for at, (layer, x) in enumerate(zip(layers, inputs, strict=True)):
                if tokens == 1 and large:
                    flush.add_(1)
                started = perf_counter()
                layer(x)
                best[at][step] = min(best[at][step], perf_counter() - started)
    return best


def _mean(times: Sequence[float]) -> float:
    """Geometric: a step of one token counts as much as a step of many."""
    return math.exp(sum(map(math.log, times)) / len(times))
