"""Texts that are cut where they tokenize by themselves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from cache.pieces import PIECE_CHARS, AddedToken, cut, cut_marks
from cache.tokens import Tokenizer
from tests.cache.tiny_tokenizers import KINDS, write_kinds

WRITTEN = "<|a|><|b|>[X] <|c|>"


def added(text: str, *, normalized: bool = False, eats_before: bool = False) -> AddedToken:
    return AddedToken(text, normalized, eats_before)


def test_marks_are_added_tokens_of_the_template_that_nothing_overlaps() -> None:
    """Another token that ends as a mark begins, or that has it within, could be found instead."""
    tokens = [
        added("<|a|>"),
        added("<|b|>", eats_before=True),
        added("[X]"),
        added("..[", normalized=False),
        added("<|c|>", normalized=True),
        added("<|d|>"),
    ]
    marks = cut_marks(tokens, WRITTEN)
    assert marks.findall("<|a|><|b|>[X]<|c|><|d|>") == ["<|a|>"]


def test_without_marks_a_text_is_one_piece() -> None:
    assert list(cut("a" * 500, cut_marks([], WRITTEN))) == ["a" * 500]


texts = st.lists(st.sampled_from(["<|a|>", "word ", "x" * PIECE_CHARS, "\n"]), max_size=20)


@given(texts, texts)
def test_a_text_that_goes_on_begins_with_the_same_pieces(first: list[str], more: list[str]) -> None:
    marks = cut_marks([added("<|a|>")], WRITTEN)
    text, longer = "".join(first), "".join(first + more)
    pieces = list(cut(text, marks))
    assert "".join(pieces) == text
    assert list(cut(longer, marks))[: len(pieces) - 1] == pieces[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_whole(kind: str, tmp_path_factory: pytest.TempPathFactory):
    """Whatever the tokenizer does at the beginning of a text: a space, a normalizer, nothing."""
    folder = write_kinds(tmp_path_factory.mktemp(kind), [kind])[kind]
    tokenizer = Tokenizer.load(folder)
    marks = tokenizer.marks(None)
    words = ["<|im_start|>", "<|im_end|>", "\n", " ", "  user", "hello world ", "é", "<x>", "the"]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(words), max_size=60))
    def agree(parts: list[str]) -> None:
        text = "".join(parts)
        apart = [
            one for piece in cut(text, marks) for one in tokenizer.encode(piece, special=False)
        ]
        assert apart == tokenizer.encode(text, special=False)

    agree()
    assert len(list(cut(("<|im_start|>" + "w" * 99) * 3, marks))) == 3
