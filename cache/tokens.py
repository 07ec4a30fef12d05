"""Messages -> token ids by the model's own chat template, and back to text. The sole importer of
tokenizers.

Knows a model folder's tokenizer files; imports neither torch nor transformers, so that the gateway
counts and hashes exactly the prompt that the runtime will see. The template's dialect is in
template.py, the spelling of bytes and incremental text in text.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from cache.template import ChatTemplate, TemplateBroken, TemplateRefusal, choose_template, map_texts
from cache.text import Spelling, UnsupportedDecoder

NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip  # one short list

# Unicode noncharacters, in no text that is meant for interchange: the quotes around words of the
# user that would otherwise be read as control tokens.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
QUOTED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")


class TokenizerUnusable(Exception):
    """A model folder whose tokenizer cannot be used: which file, what is wrong, what to do."""


class NoChatTemplate(Exception):
    """The model has no chat template, so it takes text but no messages."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One model folder's tokenizer. Nothing changes after `load`; use it from any thread."""

    folder: Path
    spelling: Spelling
    special_tokens: Mapping[str, str]  # bos_token, eos_token, ... by name
    special_ids: frozenset[int]  # left out of decoded text
    eos_ids: frozenset[int]  # any of them ends a generation
    vocab_size: int  # every id is below; the model's own table may be padded beyond
    _tokens: tokenizers.Tokenizer = field(repr=False)
    _templates: Mapping[str, ChatTemplate] = field(repr=False)
    _control: Mapping[ChatTemplate, re.Pattern[str]] = field(repr=False)
    _bytes: dict[int, bytes] = field(default_factory=dict, repr=False)  # grows as ids are seen

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json; where present tokenizer_config.json, special_tokens_map.json,
        generation_config.json, config.json, chat_template.jinja, additional_chat_templates/*.jinja
        and chat_template.json.

        Raises TokenizerUnusable; TemplateBroken when a chat template does not compile.
        """
        tokens, decoder = _read_tokenizer(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
        _apply_config(tokens, config, special)
        try:
            spelling = Spelling.of(decoder)
        except UnsupportedDecoder as error:
            raise TokenizerUnusable(f"{folder / 'tokenizer.json'}: {error}") from None
        templates = {
            name: _compile(folder, name, source, special)
            for name, source in _template_sources(folder, config).items()
        }
        return cls(
            folder=folder,
            spelling=spelling,
            special_tokens=special,
            special_ids=frozenset(
                token_id
                for token_id, token in tokens.get_added_tokens_decoder().items()
                if token.special
            ),
            eos_ids=_eos_ids(folder, tokens.token_to_id(special.get("eos_token", ""))),
            vocab_size=1 + max(tokens.get_vocab().values(), default=-1),
            _tokens=tokens,
            _templates=templates,
            _control={
                template: _control_tokens(tokens, template) for template in templates.values()
            },
        )

    # ---- text -> ids

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text; `special` adds what the model expects around every text (BOS, mostly).

        Control tokens spelled in the text become control tokens: the text is a whole prompt.
        Raises ValueError for a lone surrogate, which is no Unicode text.
        """
        try:
            return list(self._tokens.encode(text, add_special_tokens=special).ids)
        except TypeError:
            raise ValueError("the text has a lone surrogate, which is not valid Unicode") from None

    @property
    def has_template(self) -> bool:
        return bool(self._templates)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The prompt as text, for people to read; `encode_chat` is what a model should get.

        Raises NoChatTemplate, TemplateRefusal; see ChatTemplate.render.
        """
        return self._template(tools).render(
            _without_nulls(messages),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
            now=now,
        )

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
    ) -> list[int]:
        """Ids of a conversation by the model's own chat template, which writes its own BOS.

        Only the template writes control tokens: where a message, tool or variable spells one
        (`<|im_end|>`), it is encoded as the plain characters that the user typed. Control tokens
        are all special tokens, and those other added tokens that the template's text contains.
        Conversations that spell none, so nearly all, get exactly the ids of transformers'
        `apply_chat_template(tokenize=True)`; the others those of its `sanitize_control_tokens`.
        `trust_text=True` lets text spell control tokens, as transformers does by default. A control
        token that a template glues together out of several strings is beyond this.

        Raises NoChatTemplate, TemplateRefusal; see ChatTemplate.render.
        """
        template = self._template(tools)
        turns: Any = _without_nulls(messages)
        names: Any = dict(variables or {})
        control = self._control[template]
        quoted = not trust_text and any(self._spells(control, v) for v in (turns, tools, names))
        if quoted:
            quote = partial(self._quote, control)
            turns, tools, names = (map_texts(value, quote) for value in (turns, tools, names))
        text = template.render(
            turns,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=names,
            now=now,
        )
        return self._encode_quoted(text) if quoted else self.encode(text, special=False)

    def _template(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        if not self._templates:
            raise NoChatTemplate(
                f"{self.folder.name} has no chat template, so it takes no messages; "
                "/v1/completions works with it"
            )
        return choose_template(self._templates, tools)

    # ---- control tokens that a user spells

    def _spells(self, control: re.Pattern[str], value: Any) -> bool:
        if isinstance(value, str):
            return bool(control.search(value) or control.search(self._normalized(value)))
        if isinstance(value, Mapping):
            return any(self._spells(control, part) for pair in value.items() for part in pair)
        if isinstance(value, list | tuple):
            return any(self._spells(control, part) for part in value)
        return False

    def _quote(self, control: re.Pattern[str], text: str) -> str:
        text = text.replace(OPEN, "").replace(CLOSE, "")
        quoted = control.sub(f"{OPEN}\\g<0>{CLOSE}", text)
        if quoted == text and control.search(self._normalized(text)):
            return f"{OPEN}{text}{CLOSE}"
        return quoted

    def _normalized(self, text: str) -> str:
        """The text in which tokenizers look for those added tokens that are marked `normalized`."""
        normalizer = self._tokens.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text

    def _encode_quoted(self, text: str) -> list[int]:
        """Ids of a rendered text: what is in quotes as plain characters, the rest as usual."""
        usual = partial(self.encode, special=False)
        first, *pieces = QUOTED.split(text)
        ids = usual(first)
        for at, piece in enumerate(pieces):
            if piece:
                ids += _encode_within(piece, usual if at % 2 else self._encode_plain)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which no added token is recognized."""
        ids = self._tokenize(text)
        unknown = self.special_tokens.get("unk_token", "")
        control = set(self._tokens.get_added_tokens_decoder()) - {self._tokens.token_to_id(unknown)}
        if control.isdisjoint(ids):
            return ids
        # The model's own vocabulary has the control token as a word: spell it by characters.
        ids = [token_id for char in text for token_id in _encode_within(char, self._tokenize)]
        if control.isdisjoint(ids):
            return ids
        raise TemplateRefusal(f"this model cannot take {text!r} as plain text")

    def _tokenize(self, text: str) -> list[int]:
        text = self._normalized(text)
        splitter = self._tokens.pre_tokenizer
        words = [word for word, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        return [token.id for word in words for token in self._tokens.model.tokenize(word)]

    # ---- ids -> text

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


def _encode_within(piece: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of a piece from within a text: after a newline, no tokenizer puts a space before it."""
    newline, both = encode("\n"), encode("\n" + piece)
    return both[len(newline) :] if both[: len(newline)] == newline else encode(piece)


def _without_nulls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Clients send `content: null`; templates know only fields that are absent."""
    if not messages:
        raise TemplateRefusal("a chat needs at least one message")
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


# ---- a model folder -----------------------------------------------------------------------------


def _read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, Mapping[str, Any] | None]:
    """The tokenizer, and its decoder's description."""
    if not path.is_file():
        raise TokenizerUnusable(
            f"{path} is missing: the model needs its fast tokenizer there; when only another "
            "format came with it, save it with transformers: AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(folder)"
        )
    description = _read_json(path)
    try:
        tokens = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  # tokenizers raises bare Exception for any bad file
        raise TokenizerUnusable(f"{path} is not a tokenizer: {error}") from None
    tokens.no_truncation()
    tokens.no_padding()
    return tokens, description.get("decoder")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise TokenizerUnusable(
            f"{path} is not valid JSON: {error}; fetch the file again"
        ) from None
    if not isinstance(data, dict):
        raise TokenizerUnusable(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def _special_tokens(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like: tokenizer_config.json; special_tokens_map.json in older folders."""
    merged = {**config, **({} if "added_tokens_decoder" in config else older)}
    special = {}
    for name in NAMED_TOKENS:
        token = merged.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            special[name] = content
    return special


def _apply_config(
    tokens: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Where tokenizer_config.json goes beyond tokenizer.json: named tokens, add_bos_token."""
    added = {token.content for token in tokens.get_added_tokens_decoder().values() if token.special}
    named = [token for token in dict.fromkeys(special.values()) if token not in added]
    tokens.add_special_tokens([token for token in named if tokens.token_to_id(token) is not None])
    if not {"add_bos_token", "add_eos_token"} & set(config):
        return
    around = tokens.encode("", add_special_tokens=True).tokens
    ends = {}
    for name, present in (("bos_token", around[:1]), ("eos_token", around[-1:])):
        token = special.get(name)
        wanted = config.get(f"add_{name}", [token] == present)
        if token is not None and wanted and (token_id := tokens.token_to_id(token)) is not None:
            ends[name] = (token, token_id)
    template = ["$A:0"]
    if "bos_token" in ends:
        template.insert(0, f"{ends['bos_token'][0]}:0")
    if "eos_token" in ends:
        template.append(f"{ends['eos_token'][0]}:0")
    tokens.post_processor = TemplateProcessing(
        single=template, special_tokens=list(dict.fromkeys(ends.values()))
    )


def _eos_ids(folder: Path, named: int | None) -> frozenset[int]:
    """Ids that end a generation: generation_config.json, else config.json; and eos_token itself."""
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        if found is not None:
            break
    ids = found if isinstance(found, list) else [found]
    return frozenset(token_id for token_id in [*ids, named] if isinstance(token_id, int))


def _template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files come before tokenizer_config.json, as in transformers."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {
        path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if sources := {name: path.read_text("utf-8") for name, path in files.items() if path.is_file()}:
        return sources
    found = config.get("chat_template")
    if found is None:
        found = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, str):
        return {"default": found}
    return found or {}


def _compile(folder: Path, name: str, source: str, special: Mapping[str, str]) -> ChatTemplate:
    try:
        return ChatTemplate(source, special)
    except TemplateBroken as error:
        raise TemplateBroken(f"{folder.name}, template {name!r}: {error}") from None


def _control_tokens(tokens: tokenizers.Tokenizer, template: ChatTemplate) -> re.Pattern[str]:
    """What only the template may write. Added tokens of whitespace are ordinary text in it."""
    added = [
        token.content
        for token in tokens.get_added_tokens_decoder().values()
        if token.special or (token.content in template.literals and not token.content.isspace())
    ]
    longest_first = sorted(filter(None, added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
