"""What became of cached prompts: how much was there to be had, was sent for, and was found.

Knows counts of tokens by request; knows no replicas' state and no bodies. Each rung is lower than
the one above, and each difference has a cause:

    prompt      all tokens
    anywhere    that some replica is known to have        - `unknown`: nobody is known to
    available   that a replica which takes requests has   - `down`: only others have it
    captured    that the chosen replica has               - `load`: others had more, and to do
    delivered   that it found (its `cached_tokens`)       - `evicted`: it had given it up since
                                                          + `unforeseen`: it had more than known
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping
from dataclasses import asdict, dataclass

from cache.blocks import BLOCK_TOKENS


@dataclass(slots=True)
class Foreseen:
    """One request at its dispatch, in tokens."""

    prompt: int
    anywhere: int
    available: int
    captured: int


def foresee(
    prompt_tokens: int,
    matches: Mapping[Hashable, int],
    taking: Container[Hashable],
    chosen: Hashable,
) -> Foreseen:
    """`matches`: leading blocks by replica, as the index has them; `taking`: replicas that could
    have been chosen."""
    # The last token is computed in any case, since an answer begins from it, and so its block.
    most = max(0, prompt_tokens - 1) // BLOCK_TOKENS
    captured = min(matches.get(chosen, 0), most)
    anywhere, available = 0, captured
    for name, blocks in matches.items():
        anywhere = max(anywhere, min(blocks, most))
        if name in taking:
            available = max(available, min(blocks, most))
    return Foreseen(
        prompt_tokens, anywhere * BLOCK_TOKENS, available * BLOCK_TOKENS, captured * BLOCK_TOKENS
    )


@dataclass(slots=True)
class Ladder:
    """Totals in tokens since the start. `untold`: answers that said nothing of cached tokens, which
    count nowhere else."""

    requests: int = 0
    untold: int = 0
    prompt: int = 0
    anywhere: int = 0
    available: int = 0
    captured: int = 0
    delivered: int = 0
    unknown: int = 0
    down: int = 0
    load: int = 0
    evicted: int = 0
    unforeseen: int = 0

    def served(self, seen: Foreseen, prompt_tokens: int, cached_tokens: int | None) -> None:
        """A request's end, by the replica's own counts; None where it gives none."""
        if cached_tokens is None:
            self.untold += 1
            return
        self.requests += 1
        self.prompt += max(prompt_tokens, seen.anywhere)
        self.anywhere += seen.anywhere
        self.available += seen.available
        self.captured += seen.captured
        self.delivered += cached_tokens
        self.unknown += max(0, prompt_tokens - seen.anywhere)
        self.down += seen.anywhere - seen.available
        self.load += seen.available - seen.captured
        short = seen.captured - cached_tokens
        self.evicted += max(0, short)
        self.unforeseen += max(0, -short)

    def report(self) -> Mapping[str, int]:
        """For health answers."""
        return asdict(self)
