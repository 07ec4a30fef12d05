"""What a sequence shows of its tokens: whole characters, no part of a stop string, one end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from cache.tokens import Tokenizer
from runtime.sequence import Output, Reply, Sampling, Sequence
from runtime.shapes import TokenLogprob
from tests.runtime.tiny_models import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def play(tokenizer: Tokenizer, tokens: list[int], sampling: Sampling) -> list[Output]:
    """Outputs up to and with the end, as the engine would collect them."""
    sequence = Sequence(7, [1, 2, 3], sampling)
    reply = Reply(tokenizer, sequence)
    outputs = []
    for token in tokens:
        sequence.tokens.append(token)
        entry = (
            TokenLogprob(str(token), token, b"", -1.0) if sampling.logprobs is not None else None
        )
        outputs.append(reply.push(token, entry))
        if outputs[-1].finish_reason:
            break
    return outputs


texts = st.text(alphabet="abc\u00e9\u4e16\U0001f642", max_size=24)
stop_lists = st.lists(st.text(alphabet="abc\u00e9", min_size=1, max_size=4), max_size=3)


@settings(max_examples=200, deadline=None)
@given(text=texts, stops=stop_lists)
def test_text_ends_before_the_first_stop_string(tokenizer, text, stops):
    """For any text, spelled a byte a token, what is shown ends where the first stop begins."""
    tokens = tokenizer.encode(text, special=False)
    eos = min(tokenizer.eos_ids)
    sampling = Sampling(max_tokens=len(tokens) + 1, stop=tuple(stops), logprobs=0)
    outputs = play(tokenizer, [*tokens, eos], sampling)
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    shown = text[: min(ends)[1]] if ends else text
    assert "".join(output.text for output in outputs) == shown
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason == "stop"
    assert sum(len(output.logprobs) for output in outputs) == len(outputs), "one entry a token"
    assert all("\ufffd" not in output.text for output in outputs)


def test_an_end_token_is_counted_but_not_shown(tokenizer):
    """The end token leaves no text and ends with reason stop."""
    eos = min(tokenizer.eos_ids)
    outputs = play(tokenizer, [*tokenizer.encode("ab", special=False), eos], Sampling(max_tokens=9))
    assert [output.text for output in outputs] == ["a", "b", ""]
    assert outputs[-1].token_ids == (eos,)
    assert outputs[-1].finish_reason == "stop"


def test_ignore_eos_goes_on_to_the_limit(tokenizer):
    """With ignore_eos an end token is a token like any other, and never shown as text."""
    eos = min(tokenizer.eos_ids)
    outputs = play(tokenizer, [eos, eos, eos], Sampling(max_tokens=2, ignore_eos=True))
    assert [output.finish_reason for output in outputs] == [None, "length"]
    assert outputs[0].text == ""


def test_a_stop_id_ends_without_text(tokenizer):
    """stop_token_ids end the answer even when end tokens are ignored."""
    (token,) = tokenizer.encode("b", special=False)
    sampling = Sampling(max_tokens=9, stop_ids=frozenset({token}), ignore_eos=True)
    outputs = play(tokenizer, tokenizer.encode("abc", special=False), sampling)
    assert [(output.text, output.finish_reason) for output in outputs] == [
        ("a", None),
        ("", "stop"),
    ]


def test_the_limit_shows_what_was_held_back(tokenizer):
    """At max_tokens the beginning of a stop string is text after all, half a character U+FFFD."""
    tokens = tokenizer.encode("xa\u4e16", special=False)
    held = play(tokenizer, tokens[:2], Sampling(max_tokens=2, stop=("ab",)))
    assert [output.text for output in held] == ["x", "a"]
    half = play(tokenizer, tokens[2:4], Sampling(max_tokens=2))
    assert [output.text for output in half] == ["", "\ufffd"]


def test_logprobs_wait_for_their_text(tokenizer):
    """Entries of tokens that are held back come with the text that they belong to."""
    tokens = tokenizer.encode("\u4e16", special=False)
    outputs = play(tokenizer, tokens, Sampling(max_tokens=8, logprobs=0))
    assert [len(output.logprobs) for output in outputs] == [0, 0, 3]
