"""Token ids of a draft and of its target: the same, or brought together by the tokens' bytes.

Knows two tokenizers and the sizes of two models' tables; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from cache.tokens import Tokenizer

# A draft that lacks more of the target's tokens than this guesses too little to be worth running.
SHARED_MIN = 0.8


class VocabulariesDiffer(Exception):
    """A draft and its target write with different tokens; the message says how many they share."""


class Vocabulary:
    """Ids of the target in the draft's table and back. Without `ids` they are the same."""

    def __init__(self, target: int, ids: Many[int] | None = None, unknown: int = 0) -> None:
        """`target` is the size of the target's table; `ids` has the draft's id of each of its
        tokens, -1 for one that the draft does not have, which it reads as `unknown`."""
        self.target = target
        self._ids: list[int] | None = None
        if ids is not None:
            self._ids = [unknown if one < 0 else one for one in ids]
            known = [at for at, one in enumerate(ids) if one >= 0]
            self._known = torch.tensor(known, dtype=torch.long)
            self._theirs = torch.tensor([ids[at] for at in known], dtype=torch.long)

    def to_draft(self, tokens: Many[int]) -> Many[int]:
        return tokens if self._ids is None else [self._ids[token] for token in tokens]

    def to_target(self, logits: torch.Tensor) -> torch.Tensor:
        """A draft's logits [R, its V] -> [R, the target's V] in fp32; what it lacks cannot come."""
        if self._ids is None and logits.shape[1] == self.target:
            return logits.float()
        whole = torch.full((len(logits), self.target), float("-inf"), device=logits.device)
        if self._ids is None:
            size = min(self.target, logits.shape[1])
            whole[:, :size] = logits[:, :size]
        else:
            known, theirs = self._known.to(logits.device), self._theirs.to(logits.device)
            whole[:, known] = logits.float()[:, theirs]
        return whole


def vocabulary_of(
    target: Tokenizer, draft: Tokenizer, target_table: int, draft_table: int
) -> Vocabulary:
    """Raises VocabulariesDiffer where the draft lacks too many of the target's tokens."""
    tokens = min(target.vocab_size, target_table)
    theirs = min(draft.vocab_size, draft_table)
    by_bytes: dict[tuple[bytes, bool], int] = {}
    for one in range(theirs - 1, -1, -1):
        by_bytes[_name(draft, one)] = one
    ids = [by_bytes.get(_name(target, one), -1) for one in range(tokens)]
    # Rows behind the tokenizer's last token can be said, too: a bias is enough.
    if target_table <= draft_table and all(at == one for at, one in enumerate(ids)):
        return Vocabulary(target_table)
    shared = sum(one >= 0 for one in ids) / tokens
    if shared < SHARED_MIN:
        raise VocabulariesDiffer(
            f"its tokenizer has {shared:.0%} of the target's {tokens} tokens, at least "
            f"{SHARED_MIN:.0%} are needed"
        )
    end = next(iter(draft.eos_ids), 0)
    return Vocabulary(target_table, [*ids, *[-1] * (target_table - tokens)], unknown=end)


def _name(tokenizer: Tokenizer, token: int) -> tuple[bytes, bool]:
    """What a token is: its bytes, and whether they are a name for something else than text."""
    return tokenizer.token_bytes(token), token in tokenizer.special_ids
