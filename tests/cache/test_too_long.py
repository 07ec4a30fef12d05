"""Long texts: refused for their characters alone only where no tokenization could fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from cache.tokens import LONG_CHARS, Tokenizer, TooLong

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "pocket" / "target")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=50), st.integers(1, 300))
def test_a_text_that_fits_is_never_refused(text: str, times: int) -> None:
    """The bound is from below: at its own length, every text passes."""
    whole = text * times
    TOKENIZER.check_length(whole, len(TOKENIZER.encode(whole, special=True)))


def test_a_hopeless_text_is_refused_with_a_bound() -> None:
    """The bound is less than the truth, and more than the limit."""
    with pytest.raises(TooLong) as caught:
        TOKENIZER.check_length("ab " * 100_000, 1000)
    assert 1000 < caught.value.tokens <= len(TOKENIZER.encode("ab " * 100_000, special=True))
    with pytest.raises(TooLong):
        messages = [{"role": "user", "content": "ab " * 100_000}]
        TOKENIZER.encode_chat(messages, limit_tokens=1000)


@given(st.text(min_size=1, max_size=30))
def test_long_texts_get_the_ids_of_the_ordinary_way(text: str) -> None:
    """They are tokenized by another call, which does not hold the interpreter's lock."""
    long = text * (LONG_CHARS // len(text) + 1)
    expected = TOKENIZER._tokens.encode(long, add_special_tokens=True).ids
    assert TOKENIZER.encode(long, special=True) == expected
