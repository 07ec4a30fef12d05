"""Messages -> token ids by the model's own chat template, and back to text. The sole importer of
tokenizers.

Knows a model folder's tokenizer files; imports neither torch nor transformers, so that the gateway
counts and hashes exactly the prompt that the runtime will see. The template's dialect is in
template.py, the spelling of bytes and incremental text in text.py, the guard of control tokens in
control.py.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from cache.control import ControlTokens, any_of, encode_quoted, encode_within
from cache.pieces import AddedToken, cut_marks
from cache.template import ChatTemplate, TemplateBroken, TemplateRefusal, choose_template
from cache.text import Spelling, UnsupportedDecoder
from cache.tokenizer_files import (
    TokenizerUnusable,
    eos_ids,
    read_json,
    special_tokens,
    template_sources,
)

__all__ = ["NoChatTemplate", "Tokenizer", "TokenizerUnusable", "TooLong"]


LONG_CHARS = 4096
HUGE_CHARS = 2**17  # while it is tokenized, a text takes 150 to 350 times as many bytes
NORMALIZED_MAX = 4  # characters that a normalizer may compose into one, with room to spare


class TooLong(Exception):
    """A text that cannot fit, known before it is tokenized; `tokens` it has at the very least."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"the text has at least {tokens} tokens")
        self.tokens = tokens


class NoChatTemplate(Exception):
    """The model has no chat template, so it takes text but no messages."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One model folder's tokenizer. Nothing changes after `load`; use it from any thread."""

    folder: Path
    spelling: Spelling
    special_ids: frozenset[int]  # left out of decoded text
    eos_ids: frozenset[int]  # any of them ends a generation
    vocab_size: int  # every id is below; the model's own table may be padded beyond
    longest_chars: int  # no token spells more characters
    _tokens: tokenizers.Tokenizer = field(repr=False)
    _templates: Mapping[str, ChatTemplate] = field(repr=False)
    _control: Mapping[ChatTemplate, ControlTokens] = field(repr=False)
    _control_ids: frozenset[int] = field(repr=False)
    _marks: Mapping[ChatTemplate, re.Pattern[str]] = field(repr=False)
    _bytes: dict[int, bytes] = field(default_factory=dict, repr=False)  # grows as ids are seen

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json; where present tokenizer_config.json, special_tokens_map.json,
        generation_config.json, config.json, chat_template.jinja, additional_chat_templates/*.jinja
        and chat_template.json.

        Raises TokenizerUnusable; TemplateBroken when a chat template does not compile.
        """
        tokens, decoder = _read_tokenizer(folder / "tokenizer.json")
        config = read_json(folder / "tokenizer_config.json")
        special = special_tokens(config, read_json(folder / "special_tokens_map.json"))
        _recognize(tokens, special)
        try:
            spelling = Spelling.of(decoder)
        except UnsupportedDecoder as error:
            raise TokenizerUnusable(f"{folder / 'tokenizer.json'}: {error}") from None
        added = tokens.get_added_tokens_decoder()
        unknown = tokens.token_to_id(special.get("unk_token", ""))
        templates = {
            name: _compile(folder, name, source, special)
            for name, source in template_sources(folder, config).items()
        }
        return cls(
            folder=folder,
            spelling=spelling,
            special_ids=frozenset(id_ for id_, token in added.items() if token.special),
            eos_ids=eos_ids(folder, tokens.token_to_id(special.get("eos_token", ""))),
            vocab_size=1 + max(tokens.get_vocab().values(), default=-1),
            longest_chars=max(map(len, tokens.get_vocab()), default=1),
            _tokens=tokens,
            _templates=templates,
            _control={
                template: _control_tokens(tokens, template) for template in templates.values()
            },
            _marks={
                template: cut_marks(map(_added_token, added.values()), template.literals)
                for template in templates.values()
            },
            # A word that a model does not know is not one that a user made up.
            _control_ids=frozenset(
                id_
                for id_, token in added.items()
                if not token.content.isspace() and id_ != unknown
            ),
        )

    # ---- text -> ids

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text; `special` adds what tokenizer.json puts around every text (BOS, mostly).

        Control tokens spelled in the text become control tokens: the text is a whole prompt.
        Raises ValueError for a lone surrogate, which is no Unicode text.
        """
        try:
            if len(text) < LONG_CHARS:
                return list(self._tokens.encode(text, add_special_tokens=special).ids)
            # `encode` holds the interpreter's lock: 5 MB would stop every other thread for seconds.
            batch = self._tokens.encode_batch_fast([text], add_special_tokens=special)
            ids = list(batch[0].ids)
        except TypeError:
            raise ValueError("the text has a lone surrogate, which is not valid Unicode") from None
        if len(text) > HUGE_CHARS:
            del batch
            _give_back()
        return ids

    def check_length(self, text: str, limit_tokens: int) -> None:
        """Raises TooLong for a text that is hopeless by its characters alone, at no cost."""
        tokens = len(text) // (self.longest_chars * NORMALIZED_MAX)
        if tokens > limit_tokens:
            raise TooLong(tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        trust_text: bool = False,
        limit_tokens: int | None = None,
        encode: Callable[[str], list[int]] | None = None,
    ) -> list[int]:
        """Ids of a conversation by the model's own chat template, which writes its own BOS.

        Only the template writes control tokens: where a message, tool or variable spells one
        (`<|im_end|>`), it is encoded as the plain characters that the user typed; ControlTokens
        says which tokens these are. Conversations that spell none, so nearly all, get exactly the
        ids of transformers' `apply_chat_template(tokenize=True)`, and the others those of its
        `sanitize_control_tokens=True`, except that an assistant's turn keeps its `<think>` and
        `<tool_call>`. `trust_text=True` lets text spell control tokens, as transformers does by
        default. Not covered: a control token that a template glues together out of several strings.
        `encode` takes the place of the tokenizer's own for a text that needs no quoting.

        Raises NoChatTemplate, TemplateRefusal (see ChatTemplate.render), and TooLong where the text
        cannot have as few as `limit_tokens`.
        """
        template = self.template(tools)
        turns: list[Any] = _without_nulls(messages)
        control = self._control[template]
        quoted = not trust_text and control.spelled_in(turns, tools, variables)
        if quoted:
            turns = [control.quote_turn(turn) for turn in turns]
            tools, variables = control.quote(tools), control.quote(variables)
        text = template.render(
            turns,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
            now=now,
        )
        if limit_tokens is not None:
            self.check_length(text, limit_tokens)
        usual = partial(self.encode, special=False)
        return encode_quoted(text, usual, self._encode_plain) if quoted else (encode or usual)(text)

    def template(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        """The one for requests with these tools. Raises NoChatTemplate, TemplateRefusal."""
        if not self._templates:
            raise NoChatTemplate(
                f"{self.folder.name} has no chat template, so it takes no messages; "
                "/v1/completions works with it"
            )
        return choose_template(self._templates, tools)

    def marks(self, tools: Sequence[Mapping[str, Any]] | None) -> re.Pattern[str]:
        """Where a rendered conversation may be cut; see pieces.py. Raises as `template`."""
        return self._marks[self.template(tools)]

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which no added token is recognized. Raises TemplateRefusal."""
        ids = self._tokenize(text)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The model's own vocabulary has the control token as a word: spell it by characters.
        ids = [token_id for char in text for token_id in encode_within(char, self._tokenize)]
        if self._control_ids.isdisjoint(ids):
            return ids
        raise TemplateRefusal(f"this model cannot take {text!r} as plain text")

    def _tokenize(self, text: str) -> list[int]:
        """The tokenizer's own steps, without the one that looks for added tokens."""
        if self._tokens.normalizer:
            text = self._tokens.normalizer.normalize_str(text)
        splitter = self._tokens.pre_tokenizer
        words = [word for word, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        return [token.id for word in words for token in self._tokens.model.tokenize(word)]

    # ---- ids -> text

    def special_tokens_of(self, texts: Iterable[str]) -> dict[str, int]:
        """Those of the texts that are special tokens, with their ids."""
        ids = {text: self._tokens.token_to_id(text) for text in texts}
        return {text: token for text, token in ids.items() if token in self.special_ids}

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of a whole sequence, as transformers decodes it. For a growing one: Detokenizer."""
        return str(self._tokens.decode(list(ids), skip_special_tokens=skip_special))

    def __contains__(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size and self._tokens.id_to_token(token_id) is not None

    def token_text(self, token_id: int) -> str:
        """A token by itself, within a text; bytes that are half a character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, /, *, first: bool = False) -> bytes:
        """The exact bytes that a token adds to a text, or begins it with when it is the `first`.

        Ids without a token (the padding of a model's table) have none: b"".
        """
        if not first and (known := self._bytes.get(token_id)) is not None:
            return known
        token = self._tokens.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        spelled = self.spelling.spell(token or "", first=first)
        if not first:
            self._bytes[token_id] = spelled
        return spelled


def _without_nulls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Clients send `content: null`; templates know only fields that are absent."""
    if not messages:
        raise TemplateRefusal("a chat needs at least one message")
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


# ---- a model folder -----------------------------------------------------------------------------


def _give_back() -> None:
    """Lets glibc return what is free in its heap, which it would keep; nothing elsewhere."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, Mapping[str, Any] | None]:
    """The tokenizer, and its decoder's description."""
    if not path.is_file():
        raise TokenizerUnusable(
            f"{path} is missing: the model needs its fast tokenizer there; when only another "
            "format came with it, save it with transformers: AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(folder)"
        )
    description = read_json(path)
    try:
        tokens = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  # tokenizers raises bare Exception for any bad file
        raise TokenizerUnusable(f"{path} is not a tokenizer: {error}") from None
    tokens.no_truncation()
    tokens.no_padding()
    return tokens, description.get("decoder")


def _recognize(tokens: tokenizers.Tokenizer, special: Mapping[str, str]) -> None:
    """Makes every named token of the vocabulary a special one, as it is in transformers."""
    added = {token.content for token in tokens.get_added_tokens_decoder().values() if token.special}
    named = [token for token in dict.fromkeys(special.values()) if token not in added]
    tokens.add_special_tokens([token for token in named if tokens.token_to_id(token) is not None])


def _added_token(token: tokenizers.AddedToken) -> AddedToken:
    before = token.lstrip or token.single_word
    return AddedToken(token.content, normalized=token.normalized, eats_before=before)


def _compile(folder: Path, name: str, source: str, special: Mapping[str, str]) -> ChatTemplate:
    try:
        return ChatTemplate(source, special)
    except TemplateBroken as error:
        raise TemplateBroken(f"{folder.name}, template {name!r}: {error}") from None


def _control_tokens(tokens: tokenizers.Tokenizer, template: ChatTemplate) -> ControlTokens:
    """Added tokens of whitespace are ordinary text in a template, so they are not among them."""
    added = tokens.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    words = [
        token.content
        for token in added
        if token.content in template.literals and not token.content.isspace()
    ]
    loose = tokens.normalizer is not None and any(token.normalized for token in added)
    normalize = tokens.normalizer.normalize_str if loose else None
    return ControlTokens(any_of(special), any_of({*special, *words}), normalize)
