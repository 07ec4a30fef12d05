"""Logits -> token ids: greedy, temperature, min_p, top_k, top_p, and log-probabilities.

Knows tensors and `Sampling`; knows no sequences' histories. Each random row draws exactly one
uniform number from its own generator and inverts the cumulative distribution, so a seed gives the
same tokens whatever else is in the batch. Order of the filters, as in vLLM: temperature, min_p,
top_k, top_p.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

from runtime.draw import cuts_tail, draw, laws as laws_by_rows
from runtime.sequence import Sampling

# Sorting a vocabulary costs 5 ms for 16 rows of 4,096; taking its most likely tokens, 0.5 ms.
HEAD = 64


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Log-probabilities of one row: of the chosen token, and of the `ids` most likely ones."""

    chosen: float
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def sample(
    logits: torch.Tensor, samplings: Many[Sampling], uniforms: Many[float | None]
) -> list[int]:
    """One token id a row of logits [B, V]; `uniforms` in [0, 1) for rows that are not greedy."""
    drawn = [row for row, one in enumerate(samplings) if not one.greedy]
    if not drawn:
        return _argmax(logits)
    draws = [uniforms[row] or 0.0 for row in drawn]
    if len(drawn) == len(samplings):
        return _draw(logits, samplings, draws)
    tokens = _argmax(logits)
    picked = _draw(logits[drawn], [samplings[row] for row in drawn], draws)
    for row, token in zip(drawn, picked, strict=True):
        tokens[row] = token
    return tokens


def _draw(logits: torch.Tensor, samplings: Many[Sampling], uniforms: Many[float]) -> list[int]:
    take = draw_by_tensors if logits.is_cuda else draw
    return take(logits, samplings, uniforms)


def draw_by_tensors(
    logits: torch.Tensor, samplings: Many[Sampling], uniforms: Many[float]
) -> list[int]:
    """What `draw` does, by tensor operations on the logits' own device."""
    picks = [0] * len(samplings)
    whole = [row for row, one in enumerate(samplings) if not cuts_tail(one)]
    cut = [row for row, one in enumerate(samplings) if cuts_tail(one)]
    for rows, rule in ((whole, law), (cut, cut_law)):
        if rows:
            probs, ids = rule(logits[rows], [samplings[row] for row in rows])
            picked = _invert(probs, ids, [uniforms[row] for row in rows])
            for row, token in zip(rows, picked, strict=True):
                picks[row] = token
    return picks


def laws(logits: torch.Tensor, samplings: Many[Sampling]) -> torch.Tensor:
    """The law [B, V] that a token of each row is drawn from; none of the rows is greedy."""
    if not logits.is_cuda:
        return laws_by_rows(logits, samplings)
    whole, _ = law(logits, samplings)
    cut = [row for row, one in enumerate(samplings) if cuts_tail(one)]
    if cut:
        probs, ids = cut_law(logits[cut], [samplings[row] for row in cut])
        whole[cut] = torch.zeros_like(whole[cut]).scatter_(-1, ids, probs)
    return whole / whole.sum(-1, keepdim=True)


def finite_rows(logits: torch.Tensor) -> list[bool]:
    """Whether each row has a largest logit that is a number: false for NaN and infinity."""
    if logits.is_cuda:
        finite: list[bool] = logits.amax(-1).isfinite().tolist()
    else:
        finite = np.isfinite(logits.float().numpy().max(-1)).tolist()
    return finite


def _argmax(logits: torch.Tensor) -> list[int]:
    """The most likely token of each row. On a CPU numpy finds it ten times faster than torch."""
    best = logits.argmax(-1) if logits.is_cuda else logits.float().numpy().argmax(-1)
    tokens: list[int] = best.tolist()
    return tokens


def _invert(probs: torch.Tensor, ids: torch.Tensor | None, uniforms: Many[float]) -> list[int]:
    """The token at which each row's cumulative distribution passes its uniform number."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    points = torch.tensor(uniforms, dtype=torch.float64, device=probs.device)[:, None]
    # right=True: a token of probability 0 is never chosen, whatever the uniform number is.
    at = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    at = at.clamp_(max=probs.shape[-1] - 1)
    tokens: list[int] = (at if ids is None else ids.gather(-1, at))[:, 0].tolist()
    return tokens


def law(logits: torch.Tensor, samplings: Many[Sampling]) -> tuple[torch.Tensor, None]:
    """Probabilities [B, V] after temperature and min_p; a row's sum may be below 1."""
    probs = (logits.float() / _column(logits, [one.temperature for one in samplings])).softmax(-1)
    if any(one.min_p > 0 for one in samplings):
        floor = _column(logits, [one.min_p for one in samplings]) * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs, None


def cut_law(logits: torch.Tensor, samplings: Many[Sampling]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and ids, both [B, K], most likely first, after all filters.

    The top_k most likely tokens, then the smallest set of them that reaches top_p of their sum; the
    token that crosses top_p stays. K is HEAD where that is enough, or the whole vocabulary.
    """
    probs, _ = law(logits, samplings)
    vocabulary = probs.shape[-1]
    widest = max(one.top_k if one.top_k > 0 else 1 for one in samplings)
    head = min(HEAD, vocabulary)
    ordered, ids = probs.topk(head, dim=-1)
    top_p = [one.top_p if one.top_p < 1 else 2.0 for one in samplings]
    if head < vocabulary and not _head_is_enough(ordered, probs, samplings, widest):
        ordered, ids = probs.sort(dim=-1, descending=True)
    ranks = torch.arange(ordered.shape[-1], device=probs.device)
    top_k = _column(probs, [float(one.top_k if one.top_k > 0 else vocabulary) for one in samplings])
    ordered = ordered.masked_fill(ranks >= top_k, 0.0)
    reached = ordered.cumsum(-1, dtype=torch.float64) - ordered
    # A row without top_k keeps its whole mass, also what is beyond the head.
    mass = torch.where(top_k[:, :1] >= vocabulary, probs.sum(-1, keepdim=True), 0.0)
    mass = torch.maximum(mass, ordered.sum(-1, keepdim=True))
    beyond = (reached >= _column(probs, top_p) * mass) & (ranks > 0)
    return ordered.masked_fill(beyond, 0.0), ids


def _head_is_enough(
    ordered: torch.Tensor, probs: torch.Tensor, samplings: Many[Sampling], widest: int
) -> bool:
    """True when every row's top_k or top_p ends within the most likely HEAD tokens."""
    head = ordered.shape[-1]
    if widest > head:
        return False
    covered = ordered.sum(-1) / probs.sum(-1)
    return all(
        0 < one.top_k <= head or share >= one.top_p
        for one, share in zip(samplings, covered.tolist(), strict=True)
    )


def _column(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def top_logprobs(
    logits: torch.Tensor, tokens: Many[int], counts: Many[int | None]
) -> list[TopLogprobs | None]:
    """Natural log-probabilities under the model itself, before temperature and filters.

    logits [B, V]; `counts` says how many alternatives each row wants, None for a row without any.
    """
    rows = [row for row, count in enumerate(counts) if count is not None]
    answers: list[TopLogprobs | None] = [None] * len(counts)
    if not rows:
        return answers
    logprobs = logits[rows].float().log_softmax(-1)
    picked = torch.tensor([tokens[row] for row in rows], device=logits.device)[:, None]
    chosen: list[float] = logprobs.gather(-1, picked)[:, 0].tolist()
    widest = min(max(counts[row] or 0 for row in rows), logits.shape[-1])
    values, ids = logprobs.topk(widest, dim=-1)
    for at, row in enumerate(rows):
        count = counts[row] or 0
        top_ids: list[int] = ids[at, :count].tolist()
        top_values: list[float] = values[at, :count].tolist()
        answers[row] = TopLogprobs(chosen[at], tuple(top_ids), tuple(top_values))
    return answers
