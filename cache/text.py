"""Bytes and characters of a token stream: what a token spells, when it may be shown, where to stop.

Knows how tokenizer.json spells bytes (its decoder); imports no tokenizer. The unit is the byte: a
token can be half a character, so text is shown when its characters are whole.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
CHARACTER_BYTES_MAX = 4  # of one character in UTF-8


class UnsupportedDecoder(Exception):
    """tokenizer.json spells its text in a way that this module does not know."""


# ---- spelling -----------------------------------------------------------------------------------


def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (Radford et al. 2019, `bytes_to_unicode`).

    A byte that prints stands for itself, the other 68 are U+0100 and up, in order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


ALPHABET = _alphabet()


@dataclass(frozen=True, slots=True)
class Spelling:
    """How token strings spell bytes, read from the `decoder` of tokenizer.json.

    `strip` spaces go from the very start of a text; with `bare_start` a text's first token loses
    every space that `replace` would give it (the rule of the Metaspace decoder).
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    strip: int = 0
    bare_start: bool = False

    @classmethod
    def of(cls, decoder: Mapping[str, Any] | None) -> Spelling:
        """Raises UnsupportedDecoder, naming the part that is not known."""
        if decoder is None:
            raise UnsupportedDecoder("tokenizer.json has no decoder: tokens would not join to text")
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        spelling: dict[str, Any] = {"replace": ()}
        fused = False
        for step in steps:
            match step:
                case {"type": "ByteLevel"} if len(steps) == 1:
                    spelling["byte_level"] = True
                case {"type": "ByteFallback"}:
                    spelling["byte_fallback"] = True
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    spelling["replace"] += ((old, new),)
                case {"type": "Metaspace", "replacement": mark}:
                    spelling["replace"] += ((mark, " "),)
                    spelling["bare_start"] = step.get("prepend_scheme", "always") != "never"
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": " ", "start": start, "stop": 0} if fused:
                    spelling["strip"] = start
                case _:
                    raise UnsupportedDecoder(
                        f"the decoder step {step} of tokenizer.json is not supported: byte-level, "
                        "byte-fallback and Metaspace tokenizers are"
                    )
        return cls(**spelling)

    def spell(self, token: str, *, first: bool = False) -> bytes:
        """The bytes of a token string within a text, or as the `first` token of it."""
        if self.byte_level:
            try:
                return bytes([ALPHABET[char] for char in token])
            except KeyError:  # an added token: it stands for itself
                return token.encode()
        if self.byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in self.replace:
            token = token.replace(old, "" if first and self.bare_start and new == " " else new)
        return token.encode()


# ---- showing ------------------------------------------------------------------------------------


class Vocabulary(Protocol):
    """What a Detokenizer needs of a tokenizer."""

    @property
    def spelling(self) -> Spelling: ...
    @property
    def special_ids(self) -> Collection[int]: ...
    def __contains__(self, token_id: int, /) -> bool: ...
    def token_bytes(self, token_id: int, /, *, first: bool = False) -> bytes: ...


class Detokenizer:
    """Token ids of one growing sequence -> text, a whole character at a time; O(1) a token.

    All pushed text and `finish()` together are the decoding of the ids as they continue
    `prompt_ids`: a first word keeps its space when text stands before it, and a character that the
    prompt left half is completed. Bytes that are not UTF-8 become U+FFFD, one for each longest part
    that no later byte can make a character (the Unicode standard, section 3.9). Byte-level
    tokenizers decode to just that. Byte-fallback tokenizers agree wherever the bytes are valid; for
    invalid bytes their `decode` gives up the whole run of byte tokens, valid characters too, which
    a stream that has shown some of them cannot.
    """

    __slots__ = ("_decoder", "_skipped", "_start", "_strip", "_vocabulary")

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special: bool = True,
        shown: Collection[int] = (),
    ) -> None:
        """`shown` are special ids that are not skipped."""
        self._vocabulary = vocabulary
        self._skipped: Collection[int] = vocabulary.special_ids if skip_special else ()
        if shown:
            self._skipped = frozenset(self._skipped).difference(shown)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._start = True  # nothing has been said yet, so the rules for a text's start hold
        self._strip = vocabulary.spelling.strip
        ending: list[int] = []
        for token_id in reversed(prompt_ids):
            if token_id not in self._skipped and token_id in vocabulary:
                ending.append(token_id)
            if len(ending) == CHARACTER_BYTES_MAX:
                break
        for token_id in reversed(ending):
            self.push(token_id)
        if ending:
            self._start, self._strip = False, 0

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if token_id in self._skipped:
            return ""
        if not self._start:
            return self._decoder.decode(self._vocabulary.token_bytes(token_id))
        if token_id not in self._vocabulary:
            return ""
        data = self._vocabulary.token_bytes(token_id, first=True)
        while self._strip and data.startswith(b" "):
            data = data[1:]
            self._strip -= 1
        self._start = not data and self._strip > 0
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Ends the text: bytes of an unfinished character become one U+FFFD."""
        return self._decoder.decode(b"", True)


# ---- stopping -----------------------------------------------------------------------------------


class StopScanner:
    """Finds the first stop string in a growing text, and shows no part of it.

    The first is the one that ends first; of those that end together, the longest. What is held
    back is exactly the longest end of the text that could still begin a stop string.
    """

    __slots__ = ("_held", "_reach", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string, which would stop before the first word."""
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._reach = max(map(len, stops), default=1) - 1  # characters that may have to be held
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """(text to show now, whether a stop string was met); after a stop, always ("", True)."""
        if self.matched is not None:
            return "", True
        text = self._held + text
        if not self._stops:
            return text, False
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return text[:at], True
        shown = len(text) - self._hold(text)
        self._held = text[shown:]
        return text[:shown], False

    def _hold(self, text: str) -> int:
        for at in range(max(0, len(text) - self._reach), len(text)):
            end = text[at:]
            if any(stop.startswith(end) for stop in self._stops):
                return len(end)
        return 0

    def flush(self) -> str:
        """The text is over: what was held back, which now cannot become a stop string."""
        held, self._held = self._held, ""
        return held
