"""Token ids -> chained block hashes: the one definition that gateway and runtime share.

A block is `BLOCK_TOKENS` consecutive tokens; its hash covers them and, through its parent, all that
came before. Two prompts share a block's keys and values exactly when they share its hash. Knows
neither models nor pools; what else tells prompts apart (weights, adapter, tenant) is in the root.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import sha256

BLOCK_TOKENS = 16
HASH_BYTES = 32
_ID_BYTES = 4  # token ids are hashed as little-endian 32-bit integers


def root_hash(*, model: str, adapter: str | None = None, salt: str | None = None) -> bytes:
    """The parent of every first block. `model` names weights and revision; `adapter` a LoRA;
    `salt` keeps one tenant's prompts from being found by another's."""
    state = sha256(b"headgate block root 1")
    for part in (model, adapter, salt):
        if part is None:
            state.update(b"\x00")
            continue
        text = part.encode()
        state.update(b"\x01" + len(text).to_bytes(8, "little") + text)
    return state.digest()


def chain_hashes(parent: bytes, tokens: Sequence[int]) -> list[bytes]:
    """One hash per full block of `tokens`, the first one behind `parent`; the rest has none."""
    ids = array("I", tokens[: len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS])
    assert ids.itemsize == _ID_BYTES
    if sys.byteorder == "big":
        ids.byteswap()
    data = memoryview(ids.tobytes())
    width = BLOCK_TOKENS * _ID_BYTES
    hashes = []
    for at in range(0, len(data), width):
        parent = sha256(parent + data[at : at + width]).digest()
        hashes.append(parent)
    return hashes
