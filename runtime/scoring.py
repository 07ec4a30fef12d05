"""Log-probabilities of a prompt's own tokens, chunk by chunk: what `echo` with logprobs shows."""

from __future__ import annotations

import torch

from cache.tokens import Tokenizer
from runtime import sample
from runtime.logprobs import token_logprob
from runtime.sequence import Reply, Sequence
from runtime.shapes import TokenLogprob


def scores_prompt(sequence: Sequence) -> bool:
    """True while the next chunk's rows predict prompt tokens that somebody asked about."""
    return sequence.sampling.prompt_logprobs and sequence.computed < sequence.prompt_tokens


def score_prompt(
    sequence: Sequence, count: int, logits: torch.Tensor, reply: Reply, tokenizer: Tokenizer
) -> list[TokenLogprob]:
    """Entries of the prompt tokens that the next `count` rows predict; logits [count, V]."""
    first = sequence.computed
    # Row i predicts token first + i + 1; what a recomputation predicts again was sent before.
    wanted = range(
        max(first + 1, sequence.prompt_scored),
        min(first + count + 1, sequence.prompt_tokens),
    )
    targets = [sequence.tokens[at] for at in wanted]
    entries: list[TokenLogprob] = []

    def score(token: int, top: sample.TopLogprobs | None) -> None:
        entries.append(token_logprob(tokenizer, token, top, reply.prompt_offset(token)))

    if sequence.prompt_scored == 0:
        score(sequence.tokens[0], None)
        sequence.prompt_scored = 1
    if targets:
        scored = logits[wanted.start - first - 1 : wanted.stop - first - 1]
        counts = [sequence.sampling.logprobs or 0] * len(targets)
        tops = sample.top_logprobs(scored, targets, counts)
        for target, top in zip(targets, tops, strict=True):
            score(target, top)
        sequence.prompt_scored = wanted.stop
    return entries
