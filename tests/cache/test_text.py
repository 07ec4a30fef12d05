"""Streaming text: whole characters only, the same text as decoding everything at once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings, strategies as st

from cache.text import ALPHABET, Detokenizer, Spelling, StopScanner, UnsupportedDecoder
from cache.tokens import Tokenizer
from tests.cache.tiny_tokenizers import KINDS, WORDS, write_folder

BAD = "\ufffd"
kinds = pytest.mark.parametrize("kind", KINDS)
patient = settings(deadline=None)  # speed is measured elsewhere


@cache
def load(kind: str) -> Tokenizer:
    return Tokenizer.load(write_folder(Path(mkdtemp()) / kind, KINDS[kind]()))


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special=skip)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


def some_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Random ids, ids of text, and ids that have no token, one after the other."""
    text = st.text(st.sampled_from(WORDS + "é你好🙂\n\t  \x00\u2581Ġ"), max_size=8)
    parts = st.lists(
        st.one_of(
            st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=4),
            text.map(lambda words: tokenizer.encode(words, special=False)),
        ),
        max_size=5,
    )
    return [token_id for part in data.draw(parts) for token_id in part]


@kinds
@patient
@given(data=st.data(), skip=st.booleans())
def test_stream_is_the_decoding(kind: str, data: st.DataObject, skip: bool) -> None:
    """For valid bytes of any tokenizer; for any bytes at all of a byte-level one."""
    tokenizer = load(kind)
    ids = some_ids(data, tokenizer)
    text = "".join(stream(tokenizer, ids, [], skip))
    whole = tokenizer.decode(ids, skip_special=skip)
    if kind == "byte_level" or BAD not in whole:
        assert text == whole


@kinds
@patient
@given(data=st.data())
def test_continuation_is_what_a_longer_decoding_adds(kind: str, data: st.DataObject) -> None:
    """Spaces between prompt and continuation are kept, halves of a character come together."""
    tokenizer = load(kind)
    ids = some_ids(data, tokenizer)
    cut = data.draw(st.integers(0, len(ids)))
    whole = tokenizer.decode(ids)
    prompt = "".join(stream(tokenizer, ids[:cut], [])[:-1])  # without a half character at its end
    if BAD not in whole:
        assert prompt + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == whole


@kinds
@patient
@given(data=st.data())
def test_every_byte_is_shown_once_its_character_is_whole(kind: str, data: st.DataObject) -> None:
    """Shown so far is always all bytes so far, less those of a character that may come yet."""
    tokenizer = load(kind)
    ids = some_ids(data, tokenizer)
    prompt = tokenizer.encode("said", special=False)
    shown, seen = "", b""
    for token_id, piece in zip(ids, stream(tokenizer, ids, prompt), strict=False):
        shown += piece
        if token_id not in tokenizer.special_ids:
            seen += tokenizer.token_bytes(token_id)
        rest = seen.decode("utf-8", "replace").removeprefix(shown)
        assert rest in ("", BAD)
        if rest:
            assert any(
                seen[-tail:].decode("utf-8", "ignore") == ""
                for tail in range(1, min(4, len(seen) + 1))
            )


def test_two_halves_of_a_character() -> None:
    """Nothing for the first bytes of an emoji, the emoji with the last one."""
    for kind in ("byte_level", "byte_fallback_normalizer"):
        tokenizer = load(kind)
        spelled = {tokenizer.token_bytes(id_): id_ for id_ in range(tokenizer.vocab_size)}
        ids = [spelled[bytes([byte])] for byte in "🙂".encode()]
        assert stream(tokenizer, ids, []) == ["", "", "", "🙂", ""]
        assert stream(tokenizer, ids[:3], []) == ["", "", "", BAD]
        assert stream(tokenizer, ids[2:], ids[:2]) == ["", "🙂", ""]


def test_continuation_keeps_its_space() -> None:
    """A space comes through after text, and not at a text's start, which BOS alone still is."""
    tokenizer = load("byte_fallback_normalizer")
    prompt = tokenizer.encode("The cat", special=True)
    ids = tokenizer.encode("said", special=False)
    assert "".join(stream(tokenizer, ids, prompt)) == " said"
    assert "".join(stream(tokenizer, ids, prompt[:1])) == "said"
    assert (
        "".join(stream(tokenizer, ids, [tokenizer.vocab_size])) == "said"
    )  # an id without a token


@kinds
def test_token_bytes_of_every_id(kind: str) -> None:
    """A token's bytes are what it adds after another token."""
    tokenizer = load(kind)
    before = tokenizer.encode("said", special=False)
    start = tokenizer.decode(before)
    for token_id in range(tokenizer.vocab_size + 2):
        spelled = tokenizer.token_bytes(token_id)
        added = tokenizer.decode([*before, token_id], skip_special=False).removeprefix(start)
        assert spelled.decode("utf-8", "replace") == added
        assert tokenizer.token_text(token_id) == added


def test_alphabet_is_that_of_tokenizers() -> None:
    """All 256 bytes, each by its own character."""
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ALPHABET) == set(ByteLevel.alphabet())
    assert sorted(ALPHABET.values()) == list(range(256))
    (piece,) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\n é")
    assert bytes(ALPHABET[char] for char in piece[0]) == "\n é".encode()


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},  # of every token: not fused
        {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Fuse"}]},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
    ],
)
def test_unknown_decoders_are_refused(decoder: dict | None) -> None:
    """Better no model than wrong text."""
    with pytest.raises(UnsupportedDecoder, match="decoder"):
        Spelling.of(decoder)


# ---- stop strings


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow obvious way: grow the text by a character, look whether it ends in a stop string."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


def could_begin(text: str, stops: list[str]) -> int:
    """Length of the longest end of the text with which a stop string begins."""
    starts = {stop[:cut] for stop in stops for cut in range(1, len(stop))}
    return max((len(text) - at for at in range(len(text)) if text[at:] in starts), default=0)


@patient
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_scanner_shows_all_that_is_safe_and_nothing_more(
    stops: list[str], chunks: list[str]
) -> None:
    """Any text, in any pieces, with any stop strings."""
    scanner = StopScanner(stops)
    text = shown = ""
    for chunk in chunks:
        text += chunk
        emitted, hit = scanner.push(chunk)
        shown += emitted
        expected, stopped = first_stop(text, stops)
        assert hit == stopped == (scanner.matched is not None)
        if not hit:
            expected = text[: len(text) - could_begin(text, stops)]
        assert shown == expected
    assert shown + scanner.flush() == first_stop(text, stops)[0]


def test_scanner_names_the_stop_that_it_met() -> None:
    """Of two that end together the longer one, and nothing after it."""
    scanner = StopScanner(["c", "bc", "nope"])
    assert scanner.push("ab") == ("a", False)
    assert scanner.push("cd") == ("", True)
    assert scanner.matched == "bc"
    assert scanner.push("more") == ("", True)
    assert scanner.flush() == ""


def test_empty_stop_string_is_refused() -> None:
    """It would end every answer before it begins."""
    with pytest.raises(ValueError, match="empty"):
        StopScanner(["a", ""])
