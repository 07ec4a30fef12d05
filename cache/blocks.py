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
_ID_BYTES = 4  # token ids are hashed as little-endian 32-bit integers
BLOCK_BYTES = BLOCK_TOKENS * _ID_BYTES


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
    return chain_bytes(parent, id_bytes(tokens[: len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS]))


def id_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as they are hashed."""
    ids = array("I", tokens)
    assert ids.itemsize == _ID_BYTES
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def chain_bytes(parent: bytes, data: bytes) -> list[bytes]:
    """One hash per full `BLOCK_BYTES` of token ids that are bytes already."""
    view = memoryview(data)
    hashes = []
    for end in range(BLOCK_BYTES, len(data) + 1, BLOCK_BYTES):
        parent = sha256(parent + view[end - BLOCK_BYTES : end]).digest()
        hashes.append(parent)
    return hashes
