"""A call's prompt as routing sees it: how many tokens it has, and the hashes of its blocks.

Exact by the model's own tokenizer and chat template where the policy names one, else counted by
bytes and hashed over the text. A prompt that cannot be rendered fails nobody here: the replica will
say what is wrong with it. Of a conversation that has grown only what is new is tokenized.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from cache.blocks import chain_bytes, id_bytes, root_hash
from cache.conversation import chat_ids, offered, turn_of
from cache.pieces import cut
from gateway.call import CHAT_PATH, Call
from gateway.links import Encode, Link, Memory, extend, keys_of

if TYPE_CHECKING:
    from cache.tokens import Tokenizer

log = logging.getLogger("headgate.gateway")

TOKEN_BYTES = 4  # of an id as it is hashed; and of text, where no tokenizer tells
MEMORY_BYTES = 16 * 2**20  # of what is known of earlier prompts
LONG_CHARS = 4096  # more than this is tokenized in a thread
LONG_BODY_BYTES = 2**16  # more than this is rendered there, too
# Larger bodies are counted by their bytes: while it is tokenized, a text of a MiB takes 170 to 330
# MB. Those above HUGE_CHARS are tokenized one after another.
EXACT_BYTES_MAX = 2**20
HUGE_CHARS = 2**17
STEMS_MAX, STEM_CHARS = 1024, 512
KEPT_CHARS = 256  # a last piece that is shorter is not worth keeping


@dataclass(slots=True)
class Prompt:
    """`hashes` are those of full blocks, each over all that came before."""

    tokens: int
    hashes: tuple[bytes, ...]
    exact: bool  # False: tokens are bytes / 4, and the blocks are 64 bytes of text


class Served(Protocol):
    """What of a replica matters here. `tokenizer` is a model folder."""

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def tokenizer(self) -> Path | None: ...


def root(model: str, adapter: str | None, salt: str | None) -> bytes:
    """What the first block's hash stands on, here and for what replicas tell of their caches. The
    gateway knows models by their names, and a LoRA adapter by the name that clients send."""
    return root_hash(model=model, adapter=adapter, salt=salt)


class Prompts:
    """Reads prompts, and remembers the beginnings of earlier ones."""

    def __init__(
        self,
        replicas: Callable[[], Iterable[Served]],
        before: Prompts | None = None,
        *,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Goes on with what `before` knows."""
        self._replicas = replicas
        self._memory: Memory = before._memory if before else Memory(memory_bytes)
        # None: not usable.
        self._tokenizers: dict[Path, Tokenizer | None] = before._tokenizers if before else {}
        self._loading: dict[Path, asyncio.Task[None]] = {}
        self._huge = asyncio.Lock()
        self._known_stems: dict[tuple[str, str | None, str | None], tuple[bytes, bytes]] = {}

    # ---- lifespan -------------------------------------------------------------------------------

    async def __aenter__(self) -> Prompts:
        """Loads in the background: until a tokenizer is there, its prompts are counted by bytes."""
        for replica in self._replicas():
            self._tokenizer(replica.tokenizer)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.loaded()

    async def loaded(self) -> None:
        """Returns once no tokenizer is being loaded."""
        await asyncio.gather(*self._loading.values())

    def report(self) -> Mapping[str, object]:
        """For health answers."""
        failed = sum(tokenizer is None for tokenizer in self._tokenizers.values())
        return {
            "tokenizers": len(self._tokenizers) - failed,
            "tokenizers_failed": failed,
            "known_bytes": self._memory.size_bytes,
        }

    # ---- one call -------------------------------------------------------------------------------

    async def read(self, call: Call) -> Prompt:
        """Never fails for what the client sent."""
        model, adapter, folder = self._identity(call.model)
        salt = call.data.get("cache_salt")
        stem, text_stem = self._stems(model, adapter, salt if isinstance(salt, str) else None)
        tokenizer = self._tokenizer(folder)
        if tokenizer is not None and len(call.body) <= EXACT_BYTES_MAX:
            with suppress(*_not_rendered()):
                return await self._exact(tokenizer, call, stem)
        return await self._prompt(text_stem, b"text", _texts(call), bytes, exact=False)

    def _stems(self, model: str, adapter: str | None, salt: str | None) -> tuple[bytes, bytes]:
        """What hashes stand on: of blocks of tokens, and of text. Clients choose what they ask for,
        so that few are remembered, and none that is long."""
        named = model, adapter, salt
        found = self._known_stems.get(named)
        if found is None:
            stem = root(model, adapter, salt)
            text = root_hash(model=f"text for {model}", adapter=adapter, salt=stem.hex())
            found = stem, text
            if len(model) + len(salt or "") <= STEM_CHARS:
                if len(self._known_stems) >= STEMS_MAX:
                    self._known_stems.clear()
                self._known_stems[named] = found
        return found

    def count(self, model: str, text: str) -> int:
        """Tokens of a text by itself; a quarter of its bytes where no tokenizer is loaded. May be
        called from any thread."""
        folder = self._identity(model)[2]
        tokenizer = self._tokenizers.get(folder) if folder else None
        if tokenizer is not None and len(text) <= EXACT_BYTES_MAX:
            with suppress(ValueError):  # a lone surrogate
                return len(tokenizer.encode(text, special=False))
        return -(-len(text.encode("utf-8", "surrogatepass")) // TOKEN_BYTES)

    def _identity(self, name: str) -> tuple[str, str | None, Path | None]:
        """The base model's name, the adapter's, and the folder of the tokenizer."""
        found: tuple[str, str | None, Path | None] = name, None, None
        for replica in self._replicas():
            entry = replica.models.get(name)
            if entry is None:
                continue
            parent = entry.get("parent")
            base = (parent, name) if isinstance(parent, str) else (name, None)
            found = *base, replica.tokenizer
            if replica.tokenizer is not None:
                break
        return found

    async def _exact(self, tokenizer: Tokenizer, call: Call, stem: bytes) -> Prompt:
        """Raises one of `_not_rendered`."""
        if call.path != CHAT_PATH:
            return await self._completion(tokenizer, call.data["prompt"], stem)
        if len(call.body) > LONG_BODY_BYTES:
            text, ids = await asyncio.to_thread(render, tokenizer, call.data)
        else:
            text, ids = render(tokenizer, call.data)
        if text is None:
            return _prompt_of(stem, ids)
        pieces = cut(text, tokenizer.marks(offered(*_tools(call.data))))

        def encode(piece: bytes) -> bytes:
            return id_bytes(tokenizer.encode(piece.decode(), special=False))

        return await self._prompt(stem, b"chat", map(str.encode, pieces), encode, exact=True)

    async def _completion(self, tokenizer: Tokenizer, given: Any, stem: bytes) -> Prompt:
        """Of several prompts the first one's blocks count, and the tokens of all."""
        one_of_ids = isinstance(given, list) and given and all(type(one) is int for one in given)
        if one_of_ids or isinstance(given, str):
            given = [given]

        def encode(piece: bytes) -> bytes:
            return id_bytes(tokenizer.encode(piece.decode(), special=True))

        prompts = [
            await self._prompt(stem, b"completion", [one.encode()], encode, exact=True)
            if isinstance(one, str)
            else _prompt_of(stem, one)
            for one in given
        ]
        return Prompt(sum(one.tokens for one in prompts), prompts[0].hashes, exact=True)

    async def _prompt(
        self, stem: bytes, kind: bytes, pieces: Iterable[bytes], encode: Encode, *, exact: bool
    ) -> Prompt:
        """What is known of the pieces, and what is not computed anew."""
        pieces = list(pieces)
        if len(pieces) == 1 and len(pieces[0]) < KEPT_CHARS:  # quicker read than looked up
            (link,) = extend(Link(0, (), stem, b""), pieces, encode)
            return Prompt(link.size_bytes // TOKEN_BYTES, link.hashes, exact)
        keys = keys_of(stem + kind, pieces)
        known = self._memory.follow(keys)
        last = known[-1] if known else Link(0, (), stem, b"")
        new = pieces[len(known) :]
        chars = sum(map(len, new))
        if chars > HUGE_CHARS:
            async with self._huge:
                links = await asyncio.to_thread(extend, last, new, encode)
        elif chars > LONG_CHARS:
            links = await asyncio.to_thread(extend, last, new, encode)
        else:
            links = extend(last, new, encode)
        whole = known + links
        kept = len(pieces) - (len(pieces[-1]) < KEPT_CHARS) if pieces else 0
        self._memory.keep(keys[:kept], whole)
        hashes = tuple(one for link in whole for one in link.hashes)
        return Prompt(whole[-1].size_bytes // TOKEN_BYTES if whole else 0, hashes, exact)

    # ---- tokenizers -----------------------------------------------------------------------------

    def _tokenizer(self, folder: Path | None) -> Tokenizer | None:
        """What is loaded; loads it for later where that is not."""
        if folder is None:
            return None
        tokenizer = self._tokenizers.get(folder)
        if tokenizer is None and folder not in self._tokenizers and folder not in self._loading:
            self._loading[folder] = asyncio.create_task(self._load(folder))
        return tokenizer

    async def _load(self, folder: Path) -> None:
        try:
            self._tokenizers[folder] = await asyncio.to_thread(_load, folder)
        except _unusable() as error:
            log.warning("prompts are counted by bytes: %s", error)
            self._tokenizers[folder] = None
        finally:
            del self._loading[folder]


def _prompt_of(stem: bytes, ids: Sequence[int]) -> Prompt:
    return Prompt(len(ids), tuple(chain_bytes(stem, id_bytes(ids))), exact=True)


# ---- what a body says ---------------------------------------------------------------------------


def render(tokenizer: Tokenizer, data: Mapping[str, Any]) -> tuple[str | None, list[int]]:
    """A conversation's text, to be tokenized; or its ids, where they are not just those of a text.

    Raises one of `_not_rendered`.
    """
    texts: list[str] = []

    def take(text: str) -> list[int]:
        texts.append(text)
        return []

    ids = chat_ids(
        tokenizer,
        [turn_of(message) for message in data["messages"]],
        tools=offered(*_tools(data)),
        add_generation_prompt=data.get("add_generation_prompt", True),
        continue_final_message=data.get("continue_final_message", False),
        variables=data.get("chat_template_kwargs"),
        encode=take,
    )
    return (texts[-1] if texts else None), ids


def _tools(data: Mapping[str, Any]) -> tuple[Any, Any]:
    return data.get("tools"), data.get("tool_choice")


def _texts(call: Call) -> list[bytes]:
    """The prompt's text in pieces, in the order in which templates mostly write it."""
    data = call.data
    if call.path != CHAT_PATH:
        given = data.get("prompt")
        return [given.encode()] if isinstance(given, str) else [orjson.dumps(given)]
    head = [orjson.dumps(data[name]) for name in ("tools", "documents") if data.get(name)]
    return head + [orjson.dumps(message) for message in data["messages"]]


def _load(folder: Path) -> Tokenizer:
    from cache.tokens import Tokenizer

    return Tokenizer.load(folder)


@cache
def _unusable() -> tuple[type[Exception], ...]:
    """What a model folder can be wrong with."""
    from cache.template import TemplateProblem
    from cache.tokens import TokenizerUnusable

    return OSError, TemplateProblem, TokenizerUnusable


@cache
def _not_rendered() -> tuple[type[Exception], ...]:
    """What a request that nobody has checked yet can do to a template and its reader."""
    from cache.template import TemplateProblem
    from cache.tokens import NoChatTemplate

    plain = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
    return TemplateProblem, NoChatTemplate, *plain
