"""A token's log-probability as answers show it: with its text, its bytes, its rivals."""

from __future__ import annotations

from cache.tokens import Tokenizer
from runtime.sample import TopLogprobs
from runtime.shapes import TokenLogprob


def token_logprob(
    tokenizer: Tokenizer, token: int, top: TopLogprobs | None, offset: int
) -> TokenLogprob:
    """The entry of `token`, whose text begins at `offset`; `top` is None for a text's first one."""
    text, utf8 = tokenizer.token_text(token), tokenizer.token_bytes(token)
    if top is None:
        return TokenLogprob(text, token, utf8, None, offset=offset)
    rivals = tuple(
        (tokenizer.token_text(one), tokenizer.token_bytes(one), logprob)
        for one, logprob in zip(top.ids, top.logprobs, strict=True)
    )
    return TokenLogprob(text, token, utf8, top.chosen, rivals, offset)
