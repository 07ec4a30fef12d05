"""Rejection sampling, vectorised, beside the plain rule; trees beside chains."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spec_decode.verify import agreed, descend, judge


def plain_rule(target, drafted, guesses, uniforms):
    """One answer by the book: min(1, p / q), then (p - q)+ or p."""
    for place, guess in enumerate(guesses):
        p, q = target[place], drafted[place]
        if uniforms[place] >= min(1.0, p[guess] / q[guess]):
            rest = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
            return place, rest if sum(rest) > 0 else p
    return len(guesses), target[len(guesses)]


def law(rng: random.Random, size: int, *, zeros: bool) -> list[float]:
    weights = [rng.random() if not zeros or rng.random() < 0.6 else 0.0 for _ in range(size)]
    weights[rng.randrange(size)] += 0.1
    return [one / sum(weights) for one in weights]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), counts=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_a_batch_is_judged_as_each_answer_alone(seed, counts):
    """Accepted counts are the plain rule's, and the token behind them is one that its law allows,
    at the uniform number's place in it."""
    rng = random.Random(seed)
    size = 6
    cases = []
    for count in counts:
        drafted = [law(rng, size, zeros=True) for _ in range(count)]
        guesses = [rng.choices(range(size), one)[0] for one in drafted]
        target = [law(rng, size, zeros=True) for _ in range(count + 1)]
        cases.append((target, drafted, guesses, [rng.random() for _ in range(count + 1)]))
    rows = torch.tensor([row for target, *_ in cases for row in target], dtype=torch.float64)
    theirs = [row for _, drafted, *_ in cases for row in drafted]
    drafted = torch.tensor(theirs, dtype=torch.float64).view(len(theirs), size)
    uniforms = [one for *_, thrown in cases for one in thrown]
    accepted, tokens = judge(rows, drafted, [case[2] for case in cases], uniforms)
    for case, count, token in zip(cases, accepted, tokens, strict=True):
        expected, rest = plain_rule(*case)
        assert count == expected
        assert rest[token] > 0
        below = sum(rest[:token]) / sum(rest)
        assert below - 1e-9 <= case[3][-1] <= below + rest[token] / sum(rest) + 1e-9


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_at_the_ends_of_the_interval_no_impossible_token_is_said(uniform):
    """A token of probability 0 is neither accepted nor recovered."""
    target = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 0.0]])
    drafted = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    accepted, tokens = judge(target, drafted, [[0]], [uniform, uniform])
    assert accepted == [0]
    assert tokens[0] in (1, 2)


def test_where_both_laws_are_one_nothing_is_left_to_recover_and_the_law_stands():
    """Rounding refuses a guess although p equals q: p itself is what remains."""
    target = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    drafted = torch.tensor([[0.25, 0.75 + 1e-7]])
    accepted, tokens = judge(target, drafted, [[1]], [1 - 1e-9, 0.5])
    assert accepted == [0]
    assert tokens[0] in (0, 1)


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_certain_guesses_count_up_to_the_first_that_was_not_drawn(guesses, tokens):
    """What agrees is the common beginning."""
    count = agreed(guesses, tokens)
    assert guesses[:count] == tokens[:count]
    ended = count == min(len(guesses), len(tokens))
    assert ended or guesses[count] != tokens[count]


@given(
    guesses=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    data=st.data(),
)
def test_a_path_through_a_tree_is_that_of_the_drawn_tokens(guesses, data):
    """The path goes from parent to child, each child being what was drawn there, to a token that
    nobody had guessed."""
    parents = [data.draw(st.integers(-1, at - 1)) for at in range(len(guesses))]
    tokens = data.draw(
        st.lists(st.integers(0, 2), min_size=len(guesses) + 1, max_size=len(guesses) + 1)
    )
    path, said = descend(guesses, parents, tokens)
    assert len(said) == len(path) + 1
    at = -1
    for number, token in zip(path, said, strict=False):
        assert parents[number] == at
        assert guesses[number] == token == tokens[at + 1]
        at = number
    assert said[-1] == tokens[at + 1]
    ends = [guess for guess, parent in zip(guesses, parents, strict=True) if parent == at]
    assert said[-1] not in ends


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=9))
def test_a_chain_is_a_tree_without_branches(guesses, tokens):
    """Both rules say the same of it."""
    tokens = (tokens + [0] * 9)[: len(guesses) + 1]
    path, said = descend(guesses, range(-1, len(guesses) - 1), tokens)
    assert path == list(range(agreed(guesses, tokens)))
    assert said == tokens[: len(path) + 1]
