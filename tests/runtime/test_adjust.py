"""Bias, penalties and masks change the logits as the documented rule says, whatever the batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cache.tokens import Tokenizer
from runtime.adjust import DEAD_END, adjusted, adjustment
from runtime.grammar import Grammars
from runtime.lark import GrammarSpec
from runtime.sequence import Sampling

VOCABULARY = 12
POCKET = Path(__file__).parents[2] / "pocket" / "target"


def plain_rule(logits: list[float], one: Sampling, prompt: list[int], answer: list[int]):
    """The documented rule, a token at a time: bias, repetition, frequency and presence."""
    changed = list(logits)
    for token, amount in one.logit_bias:
        changed[token] += amount
    for token in {*prompt, *answer}:
        if changed[token] > 0:
            changed[token] /= one.repetition_penalty
        else:
            changed[token] *= one.repetition_penalty
    for token, count in Counter(answer).items():
        changed[token] -= count * one.frequency_penalty + one.presence_penalty
    return changed


ids = st.integers(0, VOCABULARY - 1)
rows = st.fixed_dictionaries(
    {
        "logits": st.lists(st.floats(-20, 20, width=32), min_size=VOCABULARY, max_size=VOCABULARY),
        "prompt": st.lists(ids, min_size=1, max_size=8),
        "answer": st.lists(ids, max_size=40),
        "sampling": st.builds(
            Sampling,
            presence_penalty=st.sampled_from([0.0, -2.0, 0.5, 1.0]),
            frequency_penalty=st.sampled_from([0.0, -1.0, -0.5, 0.1, 2.0]),
            repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 4.0]),
            logit_bias=st.dictionaries(ids, st.floats(-100, 100), max_size=4).map(
                lambda bias: tuple(bias.items())
            ),
        ),
    }
)


@settings(max_examples=200, deadline=None)
@given(batch=st.lists(rows, min_size=1, max_size=5))
def test_each_row_is_changed_as_the_plain_rule_changes_it_alone(batch):
    """Incremental counts over a batch equal counting everything anew for every row."""
    adjustments = [adjustment(row["sampling"], row["prompt"]) for row in batch]
    for one, row in zip(adjustments, batch, strict=True):
        for token in row["answer"]:
            if one is not None:
                one.push(token)
    logits = torch.tensor([row["logits"] for row in batch])
    before = logits.clone()
    changed, dead = adjusted(logits, adjustments)
    assert not dead
    for got, row in zip(changed.tolist(), batch, strict=True):
        expected = plain_rule(row["logits"], row["sampling"], row["prompt"], row["answer"])
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert torch.equal(logits, before), "log-probabilities are read from these"


def test_a_batch_that_asks_for_nothing_is_not_even_copied():
    """The logits that come out are the ones that went in."""
    logits = torch.randn(3, VOCABULARY)
    changed, dead = adjusted(logits, [adjustment(Sampling(), [1, 2])] * 3)
    assert changed is logits
    assert not dead


def test_half_precision_logits_are_adjusted_in_full_precision():
    """Two biases that bfloat16 could not tell apart stay apart."""
    one = adjustment(Sampling(logit_bias=((0, 64.0), (1, 64.1))), [1])
    changed, _ = adjusted(torch.zeros(1, 4, dtype=torch.bfloat16), [one])
    assert changed[0, 1] > changed[0, 0]


def test_masked_and_free_rows_share_a_batch():
    """A row with a grammar keeps its logits where it may go on, the others keep all of theirs."""
    tokenizer = Tokenizer.load(POCKET)
    vocabulary = tokenizer.vocab_size
    grammars = Grammars(tokenizer, vocabulary)
    grammar = grammars.compile(GrammarSpec("choice", '["yes", "no"]'))
    padded = torch.randn(3, vocabulary + 5)
    samplings = [Sampling(), Sampling(grammar=grammar), Sampling(logit_bias=((7, 1.0),))]
    changed, dead = adjusted(padded, [adjustment(one, [1]) for one in samplings])
    assert not dead
    assert torch.equal(changed[0], padded[0])
    kept = changed[1].isfinite().nonzero()[:, 0].tolist()
    starts = {"y", "ye", "yes", "n", "no"}
    assert {tokenizer.token_text(token) for token in kept} <= starts
    assert torch.equal(changed[1, kept], padded[1, kept])
    assert changed[2, 7] == padded[2, 7] + 1


def test_answers_of_one_grammar_go_their_own_ways():
    """Each answer has its own place in a grammar that they share."""
    tokenizer = Tokenizer.load(POCKET)
    grammar = Grammars(tokenizer, tokenizer.vocab_size).compile(GrammarSpec("regex", "a|bc"))
    a, b, c = (tokenizer.encode(char, special=False)[0] for char in "abc")
    pair = [adjustment(Sampling(grammar=grammar), [1]) for _ in range(2)]
    pair[0].push(a)
    pair[1].push(b)
    changed, _ = adjusted(torch.zeros(2, tokenizer.vocab_size), pair)
    assert changed[0].isfinite().nonzero()[:, 0].tolist() == sorted(tokenizer.eos_ids)
    assert changed[1].isfinite().nonzero()[:, 0].tolist() == [c]


def test_a_dead_end_is_told_and_does_not_touch_its_neighbours():
    """A model that lacks the only allowed token, and one whose grammar was left, get a reason."""
    tokenizer = Tokenizer.load(POCKET)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    lost = adjustment(Sampling(grammar=grammars.compile(GrammarSpec("choice", '["a"]'))), [1])
    lost.push(tokenizer.encode("b", special=False)[0])
    far = adjustment(Sampling(grammar=grammars.compile(GrammarSpec("choice", '["z"]'))), [1])
    free = adjustment(Sampling(logit_bias=((1, 1.0),)), [1])
    narrow = torch.zeros(3, tokenizer.encode("z", special=False)[0])
    changed, dead = adjusted(narrow, [lost, far, free])
    assert "may not come here" in dead[0]
    assert dead[1] == DEAD_END
    assert set(dead) == {0, 1}
    assert changed[2].tolist()[:3] == [0.0, 1.0, 0.0]


def test_a_guess_that_leads_to_a_dead_end_is_taken_back_whole():
    """The grammar had followed such a guess and stayed there: the next token that was really
    chosen was refused."""
    tokenizer = Tokenizer.load(POCKET)
    grammar = Grammars(tokenizer, tokenizer.vocab_size).compile(GrammarSpec("regex", "az|ab"))
    a, b = (tokenizer.encode(char, special=False)[0] for char in "ab")
    one = adjustment(Sampling(grammar=grammar), [1])
    narrow = np.zeros(b, np.float32)  # neither b nor z can be written
    assert one.apply(narrow.copy()) is None
    one.guess(a)
    assert one.apply(narrow.copy()) == DEAD_END
    one.keep(0)
    first = narrow.copy()
    assert one.apply(first) is None
    assert a in np.isfinite(first).nonzero()[0]
    assert one.allows([a, b]) == 2
