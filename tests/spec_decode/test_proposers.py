"""What the proposers guess: from the text itself, from recent answers, from a prediction."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from spec_decode.ngram import CANDIDATES, LONGEST, Index, NGram
from spec_decode.prediction import Prediction
from spec_decode.self_draft import kept_layers
from spec_decode.synthetic import Synthetic
from spec_decode.tree import Tree


@dataclass
class Text:
    """An answer in the making."""

    tokens: list[int]
    key: int = 0
    prompt_tokens: int = 1
    group: str = ""
    prediction: list[int] = field(default_factory=list)
    ends: frozenset[int] = frozenset()


def guess(proposer, text: Text, most: int = 4) -> list[int] | None:
    if proposer.outlook(text, most) is None:
        return None
    draft = proposer.propose([(text, most)])[0]
    return draft.ids if draft else None


def plain_search(tokens: list[int], text: list[int]) -> tuple[int, int]:
    """The longest match of the end of `text` that is followed by something, the latest of them."""
    best = (0, 0)
    for place in range(2, len(tokens) + 1):
        same = 0
        while same < min(LONGEST, place, len(text)) and tokens[place - 1 - same] == text[-1 - same]:
            same += 1
        if same >= 2 and same >= best[1]:
            best = (place, same)
    return best


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=14), text=st.lists(st.integers(0, 3), max_size=9)
)
def test_the_index_finds_what_a_scan_finds(tokens, text):
    """The longest match, the latest of equal ones; only where a pair stands at too many places may
    an old one be missed."""
    index = Index(tokens)
    index.catch_up(len(tokens))
    place, length = index.find(text)
    expected = plain_search(tokens, text)
    pair = text[-2:]
    if len(pair) == 2 and sum(tokens[at : at + 2] == pair for at in range(13)) <= CANDIDATES:
        assert (place, length) == expected
    assert length <= expected[1]
    assert tokens[place - length : place] == text[len(text) - length :]


def test_what_followed_before_is_guessed():
    """The pair 1 2 came before; what came behind it is guessed, and on into the text's own end."""
    text = Text([9, 1, 2, 3, 4, 1, 2])
    assert guess(NGram(), text) == [3, 4, 1, 2]
    assert guess(NGram(), text, 7) == [3, 4, 1, 2, 3, 4, 1], "a loop goes on as it began"


def test_the_longer_match_wins_and_says_so():
    """Three tokens that match are trusted more than two that match later."""
    text = Text([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2])
    ngram = NGram()
    outlook = ngram.outlook(text, 2)
    assert outlook is not None
    assert outlook.trust == 3
    assert guess(ngram, text, 2) == [5, 8]


def test_an_index_grows_with_its_text_as_if_made_anew():
    """Guesses never depend on when somebody asked before."""
    rng = random.Random(0)
    ngram, text = NGram(0), Text([rng.randrange(3) for _ in range(5)])
    for _ in range(200):
        fresh = NGram(0)
        assert guess(ngram, text) == guess(fresh, Text(list(text.tokens)))
        text.tokens += [rng.randrange(3) for _ in range(rng.randint(1, 3))]


def test_recent_answers_of_the_group_are_remembered_and_of_no_other():
    """An answer that has ended says what the next one of its group may say; prompts do not."""
    ngram = NGram()
    first = Text([50, 51, 52, 1, 2, 3, 4], key=1, prompt_tokens=3, group="a")
    ngram.outlook(first, 4)
    ngram.end(first)
    assert guess(ngram, Text([9, 1, 2], key=2, group="a")) == [3, 4]
    assert guess(ngram, Text([9, 1, 2], key=3, group="b")) is None
    assert guess(ngram, Text([9, 50, 51], key=4, group="a")) is None


def test_two_answers_do_not_run_into_each_other():
    """Behind the end of a remembered answer nothing is guessed."""
    ngram = NGram()
    for key, said in enumerate(([1, 2, 3], [4, 5, 6])):
        ngram.end(Text([0, *said], key=key))
    assert guess(ngram, Text([9, 1, 2], key=5)) == [3]
    assert guess(ngram, Text([9, 2, 3], key=6)) is None


def test_what_is_remembered_is_bounded():
    """Old answers are forgotten, and so are groups that nobody asks for."""
    ngram = NGram(recent_tokens=64)
    for key in range(200):
        ngram.end(Text([0, *range(10 * key, 10 * key + 10)], key=key, group=str(key % 100)))
    kept = sum(len(half.tokens) for one in ngram._groups.values() for half in one.halves)
    assert len(ngram._groups) <= 64
    assert kept <= 64 * 80
    assert not ngram._own


def test_a_tree_has_what_followed_at_several_places():
    """The longest match goes on longest; where places agree they share their guesses."""
    text = Text([7, 1, 2, 5, 8, 1, 2, 6, 6, 1, 2, 5, 9, 7, 1, 2])
    tree = Tree(0)
    assert tree.outlook(text, 6) is not None
    draft = tree.propose([(text, 6)])[0]
    assert draft is not None
    assert draft.parents is not None
    paths = []
    for number in range(len(draft.ids)):
        path, at = [], number
        while at >= 0:
            path.insert(0, draft.ids[at])
            at = draft.parents[at]
        paths.append(path)
    assert [5, 8, 1] in paths, "behind the three tokens that stood there before"
    assert [6] in paths, "behind the last two"
    assert len(draft.ids) <= 6
    assert draft.depths == [len(path) - 1 for path in paths]


def test_a_tree_of_one_branch_is_a_chain():
    """So that it is verified as one."""
    tree, text = Tree(0), Text([9, 1, 2, 3, 4, 1, 2])
    assert tree.outlook(text, 3) is not None
    draft = tree.propose([(text, 3)])[0]
    assert draft is not None
    assert (draft.ids, draft.parents) == ([3], None)


def test_a_prediction_is_followed_from_its_beginning():
    """The first guess needs no match; what the answer has said already is skipped."""
    prediction = Prediction()
    text = Text([9], prediction=[1, 2, 3, 4, 5])
    assert guess(prediction, text, 3) == [1, 2, 3]
    text.tokens += [1, 2]
    assert guess(prediction, text, 9) == [3, 4, 5]
    text.tokens += [3, 4, 5]
    assert guess(prediction, text) is None, "it has come to its end"


def test_a_prediction_is_found_again_behind_a_change():
    """The client predicted a text in which one word has changed, or is missing."""
    prediction = Prediction()
    text = Text([9], prediction=[1, 2, 3, 4, 5, 6, 7, 8])
    assert guess(prediction, text, 2) == [1, 2]
    text.tokens += [1, 2, 30]
    assert guess(prediction, text, 2) is None
    text.tokens += [4, 5]
    assert guess(prediction, text, 2) == [6, 7]
    text.tokens += [6, 7, 8]
    assert guess(prediction, text, 2) is None


def test_no_prediction_costs_and_guesses_nothing():
    """Answers without one are not even looked at."""
    prediction = Prediction()
    assert prediction.outlook(Text([1, 2]), 4) is None
    assert not prediction._readings


def test_synthetic_guesses_are_right_as_often_as_asked():
    """With a rate a and k guesses, a step says (1 - a^(k+1)) / (1 - a) tokens: within 2 %."""
    for rate in (0.6, 0.7, 0.8, 0.9):
        for count in (1, 3, 5):
            synthetic = Synthetic(rate, random.Random(1))
            drafts = synthetic.propose([(Text([1]), count)] * 40_000)
            said = sum(1 + draft.forced for draft in drafts) / len(drafts)
            assert said == pytest.approx((1 - rate ** (count + 1)) / (1 - rate), rel=0.02)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Synthetic(1.5, random.Random())


@given(count=st.integers(1, 80), share=st.floats(0.01, 1.0))
def test_layers_are_kept_at_both_ends_and_evenly_between(count, share):
    """Each once, in order, about as many as asked for."""
    kept = kept_layers(count, share)
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    assert len(kept) == min(count, max(1, round(count * share)))
    assert len(kept) == 1 or kept[-1] == count - 1
