"""Made-up text for traces that have lengths only: the same words for the same block, always.

Equal blocks of a trace become equal text at equal places, so that prefix caches find what they
found in production. How many tokens a word is, the server that is asked tells (`measured`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING, Any

from evals.item import Item

if TYPE_CHECKING:
    from evals.client import Client
    from evals.rows import Row

BLOCK_TOKENS = 512  # of Mooncake; others have no blocks, and get theirs of this size
PROBE_WORDS = (64, 256)
_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face level office door health person art war history party result change morning "
    "reason research girl guy moment air teacher force education"
)
WORDS = tuple(_TEXT.split(" "))


class Filler:
    """Makes requests of so many tokens, as far as `per_word` and `overhead` (of the template) are
    true of the server. `token_share` scales every length."""

    def __init__(
        self, per_word: float = 1.0, overhead: float = 0.0, token_share: float = 1.0
    ) -> None:
        self.per_word = per_word
        self.overhead = overhead
        self.token_share = token_share

    def body(self, row: Row) -> dict[str, Any]:
        """A chat request as long as the row says, whose answer is as long as it says."""
        prompt_tokens = row.prompt_tokens * self.token_share - self.overhead
        text = self.text(max(prompt_tokens, 1.0), row.blocks, row.id)
        return {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max(round(row.output_tokens * self.token_share), 1),
            "ignore_eos": True,
            "temperature": 0,
        }

    def text(self, tokens: float, blocks: tuple[int, ...], otherwise: str) -> str:
        """Words for so many tokens; blocks that there are none of are `otherwise`'s own."""
        words = max(round(tokens / self.per_word), 1)
        size = max(round(BLOCK_TOKENS * self.token_share / self.per_word), 1)
        pieces = []
        for place in range(-(-words // size)):
            seed = f"block {blocks[place]}" if place < len(blocks) else f"{otherwise} {place}"
            rest = words - place * size
            block = _block(seed, size)
            pieces.append(block if rest >= size else " ".join(block.split(" ")[:rest]))
        return " ".join(pieces)


@lru_cache(maxsize=4096)
def _block(seed: str, words: int) -> str:
    rng = random.Random(seed)  # noqa: S311  # no secret
    return " ".join(rng.choices(WORDS, k=words))


async def measured(client: Client, model: str, token_share: float = 1.0) -> Filler | None:
    """A filler for the server behind `client`, by two requests of known words; None where it does
    not answer them with its usage."""
    told = []
    for words in PROBE_WORDS:
        text = Filler().text(words, (), "probe")
        body: Mapping[str, Any] = {
            "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 1
        }  # fmt: skip
        seen = await client.ask(Item("probe", "probe", 0, body), "probe", "probe", now=monotonic)
        if not seen.ok or seen.prompt_tokens is None:
            return None
        told.append(seen.prompt_tokens)
    per_word = (told[1] - told[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    return Filler(max(per_word, 0.1), max(told[0] - per_word * PROBE_WORDS[0], 0.0), token_share)
