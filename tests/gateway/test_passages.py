"""Passages in prompts: doubles go, the best for the question stay, all else stays as it was."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from gateway.passages import choose, distinct, part, shorten_documents, shorten_text
from policies.trimming import Passages

TIDES = "The tides follow the moon and rise twice a day along this coast."
BREAD = "Bread is baked at four in the morning and sold from six o'clock on."
TRAIN = "The last train to the harbour leaves at eleven in the evening."
PROMPT = f"[1] {TIDES}\n\n[2] {BREAD}\n\n[3] {TRAIN}\n\nQuestion: when does the last train leave?"


def test_the_best_passages_for_the_question_stay_in_their_order() -> None:
    one = shorten_text(PROMPT, Passages(keep=1))
    assert one == f"[3] {TRAIN}\n\nQuestion: when does the last train leave?"
    two = shorten_text(PROMPT.replace("when", "the moon, and when"), Passages(keep=2))
    assert TIDES in two and TRAIN in two and BREAD not in two
    assert two.index(TIDES) < two.index(TRAIN)


def test_a_double_under_another_number_goes() -> None:
    doubled = PROMPT.replace("\n\nQuestion", f"\n\n[4] {TIDES.lower()}\n\nQuestion")
    assert shorten_text(doubled, Passages(near_duplicates=0.8)) == PROMPT


def test_a_text_without_passages_is_untouched() -> None:
    settings = Passages(keep=1, near_duplicates=0.5)
    for text in ("", "hello", f"[1] {TIDES}", "see [1] and [2] below", "1. a\n2. b"):
        assert shorten_text(text, settings) == text


def test_a_question_that_no_passage_knows_keeps_all() -> None:
    text = f"Passage 1: {TIDES}\nPassage 2: {BREAD}\n\nQuidquid?"
    assert shorten_text(text, Passages(keep=1)) == text


def test_documents_of_a_request_are_chosen_alike() -> None:
    documents = [{"title": "a", "text": TIDES}, {"title": "b", "text": BREAD}, {"text": TRAIN}]
    settings = Passages(keep=1)
    assert shorten_documents(documents, "When is bread sold?", settings) == [documents[1]]


@given(st.lists(st.text(max_size=40), max_size=8), st.text(max_size=200))
def test_parts_make_up_the_text(passages: list[str], after: str) -> None:
    """Nothing is lost or invented by taking a text apart, whatever stands in it."""
    text = "".join(f"[{n}] {passage}\n" for n, passage in enumerate(passages)) + after
    parted = part(text)
    if parted is not None:
        assert parted.text(range(len(parted.passages))) == text
        assert len(parted.passages) >= 2


words = st.text(alphabet="abc ", min_size=1, max_size=30)


@given(st.lists(words, min_size=1, max_size=8), st.floats(0.1, 1))
def test_of_doubles_the_first_stays(passages: list[str], share: float) -> None:
    kept = distinct(passages, share)
    assert kept[0] == 0
    assert kept == sorted(set(kept))
    again = distinct([passages[at] for at in kept], share)
    assert again == list(range(len(kept)))


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_never_more_than_asked_for_and_never_none(keep: int) -> None:
    passages = [f"words of {n} and more {'tide' * (n % 3)}" for n in range(5)]
    assert len(choose(passages, "words", Passages(keep=keep))) == keep
