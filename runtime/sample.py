"""Logits -> token ids: greedy, temperature, min_p, top_k, top_p, and log-probabilities.

Knows tensors and `Sampling`; knows no sequences' histories. Each random row draws exactly one
uniform number from its own generator and inverts the cumulative distribution, so a seed gives the
same tokens whatever else is in the batch. Order of the filters, as in vLLM: temperature, min_p,
top_k, top_p.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Many
from dataclasses import dataclass

import torch

from runtime.sequence import Sampling


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
    picks: list[int] = logits.argmax(-1).tolist()
    random_rows = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if not random_rows:
        return picks
    chosen = [samplings[row] for row in random_rows]
    drawn = [uniforms[row] for row in random_rows]
    subset = logits if len(random_rows) == len(samplings) else logits[random_rows]
    cumulative = filtered_probs(subset, chosen).cumsum(-1)
    points = torch.tensor(drawn, dtype=torch.float64, device=logits.device)[:, None]
    # right=True: a token of probability 0 is never chosen, whatever the uniform number is.
    ids = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    ids = ids.clamp_(max=logits.shape[-1] - 1)
    for row, token in zip(random_rows, ids[:, 0].tolist(), strict=True):
        picks[row] = token
    return picks


def filtered_probs(logits: torch.Tensor, samplings: Many[Sampling]) -> torch.Tensor:
    """[B, V] float64 probabilities after temperature and filters, which leave sums below 1."""
    device = logits.device

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    probs = (logits.double() / column([s.temperature for s in samplings])).softmax(-1)
    if any(s.min_p > 0 for s in samplings):
        floor = column([s.min_p for s in samplings]) * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0.0)
    vocabulary = logits.shape[-1]
    if any(0 < s.top_k < vocabulary for s in samplings) or any(s.top_p < 1 for s in samplings):
        probs = _cut_tail(probs, samplings, column)
    return probs


def _cut_tail(
    probs: torch.Tensor,
    samplings: Many[Sampling],
    column: Callable[[list[float]], torch.Tensor],
) -> torch.Tensor:
    """Keeps the top_k most likely tokens, then the smallest set of them that reaches top_p.

    The token that crosses top_p stays; equal probabilities keep the lower id first.
    """
    vocabulary = probs.shape[-1]
    ordered, order = probs.sort(stable=True, dim=-1, descending=True)
    ranks = torch.arange(vocabulary, device=probs.device)
    top_k = column([float(s.top_k if s.top_k > 0 else vocabulary) for s in samplings])
    ordered = ordered.masked_fill(ranks >= top_k, 0.0)
    before = ordered.cumsum(-1) - ordered
    top_p = column([s.top_p if s.top_p < 1 else 2.0 for s in samplings]) * ordered.sum(
        -1, keepdim=True
    )
    ordered = ordered.masked_fill((before >= top_p) & (ranks > 0), 0.0)
    return torch.zeros_like(probs).scatter_(-1, order, ordered)


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
