"""Random tokens from logits in the CPU's memory: the law of sample.py, and no vocabulary sorted.

Knows numpy and `Sampling`. A row's tokens do not depend on the rows beside it. What top_k and top_p
keep is found by thresholds, and only that is sorted; docs/log.md (2026-11-25) has what it saves.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.sequence import Sampling

Floats = NDArray[np.float32]
Sums = NDArray[np.float64]
Ids = NDArray[np.intp]

# Rows are taken together as long as they fit a core's cache.
CHUNK_NUMBERS = 2**18
BLOCK = 64
HEAD = 64
# Where tokens of top_p are looked for: those at least this fraction as likely as the likeliest.
RUNGS = (1 / 256, 1 / 32768)


def draw(logits: torch.Tensor, samplings: Many[Sampling], uniforms: Many[float]) -> list[int]:
    """One token id a row of logits [R, V], at its uniform number in [0, 1) of its distribution."""
    tokens: list[int] = []
    rows = max(1, CHUNK_NUMBERS // logits.shape[-1])
    for first in range(0, logits.shape[0], rows):
        part = slice(first, first + rows)
        tokens += _draw_together(logits[part], samplings[part], uniforms[part])
    return tokens


def _draw_together(
    logits: torch.Tensor, samplings: Many[Sampling], uniforms: Many[float]
) -> list[int]:
    probs = likelihoods(logits, samplings)
    tokens = [0] * len(samplings)
    whole = [row for row, one in enumerate(samplings) if not cuts_tail(one)]
    tails = [row for row, one in enumerate(samplings) if cuts_tail(one)]
    for rows in (whole, tails):
        if not rows:
            continue
        mine = probs if len(rows) == len(samplings) else probs[rows]
        points = np.array([uniforms[row] for row in rows])
        if rows is whole:
            picked = _invert(mine, points)
        else:
            picked = _draw_from_heads(mine, [samplings[row] for row in rows], points)
        for row, token in zip(rows, picked, strict=True):
            tokens[row] = token
    return tokens


def cuts_tail(one: Sampling) -> bool:
    return one.top_k > 0 or one.top_p < 1


def likelihoods(logits: torch.Tensor, samplings: Many[Sampling]) -> Floats:
    """Probabilities [R, V] after temperature and min_p; a row's sum may be below 1."""
    scaled = logits.float()
    if any(one.temperature != 1 for one in samplings):
        temperatures = np.array([[one.temperature] for one in samplings], np.float32)
        scaled = torch.from_numpy(scaled.numpy() / temperatures)
    probs: Floats = scaled.softmax(-1).numpy()
    for row, one in zip(probs, samplings, strict=True):
        if one.min_p > 0:
            np.multiply(row, row >= np.float32(one.min_p) * row.max(), out=row)
    return probs


def laws(logits: torch.Tensor, samplings: Many[Sampling]) -> torch.Tensor:
    """The whole law of each row, [R, V], after all filters; each row's sum is 1."""
    probs = likelihoods(logits, samplings)
    for row, one in zip(probs, samplings, strict=True):
        if cuts_tail(one):
            ids, _ = cut(row, one)
            kept = row[ids]
            row[:] = 0.0
            row[ids] = kept
    probs /= probs.sum(-1, keepdims=True)
    return torch.from_numpy(probs)


def _draw_from_heads(probs: Floats, samplings: Many[Sampling], uniforms: Sums) -> list[int]:
    """Draws that stay within each row's HEAD likeliest tokens, all rows at once; `cut` for others.

    Only the drawn token's id is looked up, by its probability.
    """
    rows, vocabulary = probs.shape
    head, every = min(HEAD, vocabulary), np.arange(rows)
    top = np.partition(probs, vocabulary - head, axis=-1)[:, vocabulary - head :]
    top.sort(-1)
    top = top[:, ::-1]
    sums = top.cumsum(-1, dtype=np.float64)
    top_k = np.array([one.top_k if one.top_k > 0 else vocabulary for one in samplings])
    top_p = np.array([one.top_p for one in samplings])
    mass = sums[every, np.minimum(top_k, head) - 1]
    if head < top_k.max():
        mass = np.where(top_k < vocabulary, mass, probs.sum(-1, dtype=np.float64))
    reached = np.count_nonzero(sums < (top_p * mass)[:, None], axis=-1) + 1
    count = np.where(top_p < 1, np.minimum(top_k, reached), top_k)
    beyond = (count > head) | ((top_k > head) & (top_k < vocabulary))
    count = np.minimum(count, head)
    ends = sums[every, count - 1]
    rank = np.minimum(
        np.count_nonzero(sums <= (uniforms * ends)[:, None], axis=-1),
        np.count_nonzero(sums < ends[:, None], axis=-1),
    )
    drawn = top[every, rank][:, None]
    same = probs == drawn
    tokens: list[int] = same.argmax(-1).tolist()
    for row in np.flatnonzero(beyond | (rank > np.count_nonzero(top > drawn, axis=-1))).tolist():
        if beyond[row]:
            ids, steps = cut(probs[row], samplings[row])
            at = min(int(steps.searchsorted(uniforms[row] * steps[-1], "right")), len(ids) - 1)
        else:  # one of several equally likely ones
            ids = np.flatnonzero(same[row])
            at = int(rank[row] - np.count_nonzero(top[row] > drawn[row]))
        tokens[row] = int(ids[at])
    return tokens


def cut(probs: Floats, one: Sampling) -> tuple[Ids, Sums]:
    """The tokens that top_k and top_p keep of one row [V], likeliest first, and the running sums of
    their probabilities. The token that crosses top_p stays; none has probability 0."""
    mass = None
    if 0 < one.top_k < len(probs):
        least = np.partition(probs, len(probs) - one.top_k)[len(probs) - one.top_k]
        ids = _first(probs, one.top_k, least)
    elif one.top_p < 1:
        mass = probs.sum(dtype=np.float64)
        ids = _enough(probs, one.top_p * mass)
    else:
        ids = np.flatnonzero(probs)
    kept = probs[ids]
    falling = kept.argsort()[::-1]
    sums = kept[falling].cumsum(dtype=np.float64)
    if one.top_p < 1:
        count = sums.searchsorted(one.top_p * (sums[-1] if mass is None else mass)) + 1
        falling, sums = falling[:count], sums[:count]
    return ids[falling], sums


def _first(values: Floats, count: int, least: np.float32) -> Ids:
    """Where the `count` largest values are, the last of which is `least`; never where 0 is."""
    if least == 0:
        return np.flatnonzero(values)
    at = np.flatnonzero(values >= least)
    if len(at) > count:  # some are equal to the last
        keep = values[at] > least
        keep[np.flatnonzero(~keep)[: count - np.count_nonzero(keep)]] = True
        at = at[keep]
    return at


def _enough(probs: Floats, mass: float) -> Ids:
    """Ids of tokens likelier than all the others, with at least this mass together."""
    likeliest = probs.max()
    for rung in RUNGS:
        ids = np.flatnonzero(probs >= likeliest * np.float32(rung))
        if probs[ids].sum(dtype=np.float64) >= mass:
            return ids
    return np.flatnonzero(probs)


def _invert(probs: Floats, uniforms: Sums) -> list[int]:
    """The token at which each row's cumulative distribution passes its uniform number.

    In two steps, over blocks of the vocabulary and within one. Sums are taken in double precision;
    a token of probability 0 is never chosen, whatever the uniform number is.
    """
    rows, vocabulary = probs.shape
    if vocabulary % BLOCK:
        probs = np.pad(probs, ((0, 0), (0, -vocabulary % BLOCK)))
    blocks = probs.reshape(rows, -1, BLOCK)
    edges = torch.from_numpy(blocks).sum(-1).numpy().cumsum(-1, dtype=np.float64)
    points = uniforms * edges[:, -1]
    at = _passed(edges, points)
    every = np.arange(rows)
    points -= np.where(at > 0, edges[every, at - 1], 0.0)
    within = blocks[every, at].cumsum(-1, dtype=np.float64)
    tokens: list[int] = (at * BLOCK + _passed(within, points)).tolist()
    return tokens


def _passed(edges: Sums, points: Sums) -> Ids:
    """The first step of each row of cumulative sums that ends beyond its point; at most the last
    step that is one."""
    passed = np.count_nonzero(edges <= points[:, None], axis=-1)
    last = np.count_nonzero(edges < edges[:, -1:], axis=-1)
    at: Ids = np.minimum(passed, last)
    return at
