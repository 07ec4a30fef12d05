"""Writes frames.json: raw frames of KV-cache events, as each engine has put them on the wire.

`python -m tests.gateway.recording` (some seconds: our runtime's are a real worker's). vLLM's and
SGLang's are made here by the structs that their sources declare at the versions named, with the
encoder that they use, which needs no GPU. Expected is what is held in the end, as tokens.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from command.machine import free_ports

FRAMES = Path(__file__).with_name("frames.json")
A = list(range(100, 148))  # three blocks of 16
B = [*A[:16], *range(200, 232)]  # shares the first
SALTED = list(range(300, 316))
ADAPTED = list(range(400, 432))
PICTURE = list(range(500, 532))


# ---- vLLM until 2026-06: positional events ----


class _Array(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    pass


class _ArrayStored(_Array, tag="BlockStored"):
    block_hashes: list[Any]
    parent_block_hash: Any
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: Any = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class _ArrayRemoved(_Array, tag="BlockRemoved"):
    block_hashes: list[Any]
    medium: str | None
    group_idx: int | None = None


class _ArrayCleared(_Array, tag="AllBlocksCleared"):
    pass


# ---- vLLM from 0.26 on: events as maps ----


class _Map(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class _MapStored(_Map, tag="BlockStored"):
    block_hashes: list[Any]
    parent_block_hash: Any
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: Any = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class _MapRemoved(_Map, tag="BlockRemoved"):
    block_hashes: list[Any]
    medium: str | None
    group_idx: int | None = None
    remaining_copy_counts: list[int] | None = None


class _MapCleared(_Map, tag="AllBlocksCleared"):
    pass


# ---- SGLang: positional, neither LoRA names nor keys ----


class _SglStored(_Array, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None


class _SglRemoved(_Array, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None = None


class _Batch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class _BatchMap(msgspec.Struct, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


def _names(count: int, first: int, *, as_bytes: bool) -> list[Any]:
    """An engine's hashes: anything."""
    numbers = [(first + at) * 0x9E3779B97F4A7C15 % 2**64 for at in range(count)]
    return [number.to_bytes(8, "big") * 4 if as_bytes else number for number in numbers]


def vllm(stored: Any, removed: Any, cleared: Any, *, as_bytes: bool, counts: bool) -> list[Any]:
    """Steps of an engine: prompts that share, an adapter, a salt, a picture, copies, a second tier,
    a group with a window, a clearing in the middle."""
    a, b, salted, adapted, picture, old = (
        _names(count, first, as_bytes=as_bytes)
        for count, first in ((3, 1), (2, 11), (1, 21), (2, 31), (2, 41), (1, 51))
    )
    left = {"remaining_copy_counts": [1]} if counts else {}
    gone = {"remaining_copy_counts": [0]} if counts else {}
    return [
        [stored(old, None, list(range(16)), 16, None, "GPU", None)],
        [cleared()],
        [stored(a, None, A, 16, None, "GPU", None, [None] * 3, 0, "full_attention")],
        [
            stored(b, a[0], B[16:], 16, None, "GPU", None, [None] * 2, 0, "full_attention"),
            stored(b, a[0], B[16:], 16, None, "GPU", None, [None] * 2, 1, "sliding_window", 1024),
        ],
        [
            stored(salted, None, SALTED, 16, None, "GPU", None, [["blue"]], 0, "full_attention"),
            stored(
                adapted, None, ADAPTED, 16, 1, "GPU", "sql", [["sql"], ["sql"]], 0, "full_attention"
            ),
            stored(
                picture, None, PICTURE, 16, None, "GPU", None, [None, [["hash", 16]]], 0,
                "full_attention",
            ),
        ],
        [stored([a[2]], a[1], A[32:], 16, None, "GPU", None, [None], 0, "full_attention")],  # twice
        [removed([a[2]], "GPU", 0, **left), removed([b[0]], "GPU", 1)],
        [stored(a[:2], None, [], 0, None, "CPU", None)],  # by their names alone
        [removed([b[1]], "GPU", 0, **gone)],
    ]  # fmt: skip


VLLM_HELD = {
    "GPU": [
        {"tokens": A},
        {"tokens": B[:32]},
        {"tokens": SALTED, "salt": "blue"},
        {"tokens": ADAPTED, "adapter": "sql"},
        {"tokens": PICTURE[:16]},
    ],
    "CPU": [{"tokens": A[:32]}],
}  # and of the picture's second block a name that no text has


def sglang(page: int) -> list[Any]:
    """One event a page, leaves evicted first, host memory as CPU_PINNED."""

    def pages(tokens: list[int], first: int, parent: Any = None) -> tuple[list[Any], list[int]]:
        names = _names(len(tokens) // page, first, as_bytes=False)
        events = []
        for at, name in enumerate(names):
            cut = tokens[at * page : (at + 1) * page]
            events.append(_SglStored([name], parent, cut, page, None, "GPU"))
            parent = name
        return events, names

    first, a = pages(A, 1)
    second, b = pages(B[16:], 1001, a[16 // page - 1])
    host = [
        _SglStored([name], a[at - 1] if at else None, A[at * page : (at + 1) * page], page, None,
                   "CPU_PINNED")
        for at, name in enumerate(a[: 16 // page])
    ]  # fmt: skip
    return [[_ArrayCleared()], first, second, host, [_SglRemoved([b.pop()], "GPU")], []]


def batches(steps: list[Any], kind: Any) -> list[bytes]:
    encode = msgspec.msgpack.encode
    return [encode(kind(1e9 + at, events, 0)) for at, events in enumerate(steps)]


def ours() -> tuple[list[bytes], dict[str, list[dict[str, Any]]]]:
    """Of a real worker with pocket: two chats that share a beginning, one with a salt."""
    import httpx

    from tests.end_to_end.stack import CHAT
    from tests.end_to_end.test_events import worker
    from tests.runtime.subscriber import Known, Subscriber

    port, live, replay = free_ports(3)
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.yaml"
        policy.write_text(
            "version: 1\nruntime:\n  kv_tokens: 1024\n  threads: 1\n  kv_events:\n"
            f"    endpoint: tcp://127.0.0.1:{live}\n    replay_endpoint: tcp://127.0.0.1:{replay}\n"
        )
        at = (f"tcp://127.0.0.1:{live}", f"tcp://127.0.0.1:{replay}")
        with worker(Path(folder), policy, port) as one, Subscriber(*at) as follows:
            for at_order, salt in enumerate((None, None, "blue")):
                text = f"Where is order JR-9265? And order {at_order * 7}? " * 6
                httpx.post(
                    one.url + CHAT,
                    json={"model": "pocket", "messages": [{"role": "user", "content": text}],
                          "max_tokens": 20, "ignore_eos": True}
                    | ({"cache_salt": salt} if salt else {}),
                    timeout=60,
                ).raise_for_status()  # fmt: skip
            found = follows.replay(0)
            known = Known()
            for _, number, payload in found:
                known.take(number, payload, replayed=True)
    return [payload for _, _, payload in found], {"GPU": _held(known.blocks)}


def _held(blocks: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each block that no other follows as its prompt's tokens."""
    parents = {block["parent"] for block in blocks.values()}
    held = []
    for name, block in blocks.items():
        if name in parents:
            continue
        tokens: list[int] = []
        while True:
            tokens = [*block["tokens"], *tokens]
            if block["parent"] is None:
                break
            block = blocks[block["parent"]]
        held.append({"tokens": tokens, "salt": (block["extra"] or [None])[0]})
    return held


def main() -> None:
    sgl_held = {"GPU": [{"tokens": A}, {"tokens": B[:32]}], "CPU": [{"tokens": A[:16]}]}
    arrays = (_ArrayStored, _ArrayRemoved, _ArrayCleared)
    maps = (_MapStored, _MapRemoved, _MapCleared)
    own, own_held = ours()
    records = {
        "vLLM 0.11, arrays": (
            batches(vllm(*arrays, as_bytes=False, counts=False), _Batch), VLLM_HELD, 1
        ),
        "vLLM 0.12, arrays, hashes as bytes": (
            batches(vllm(*arrays, as_bytes=True, counts=False), _Batch), VLLM_HELD, 1
        ),
        "vLLM 0.26, maps": (
            batches(vllm(*maps, as_bytes=False, counts=False), _Batch), VLLM_HELD, 1
        ),
        "vLLM, maps in maps, copies counted": (
            batches(vllm(*maps, as_bytes=True, counts=True), _BatchMap), VLLM_HELD, 1
        ),
        "SGLang, pages of 16": (batches(sglang(16), _Batch), sgl_held, 0),
        "SGLang, pages of one token": (batches(sglang(1), _Batch), sgl_held, 0),
        "ours": (own, own_held, 0),
    }  # fmt: skip
    written = {
        name: {"batches": [one.hex() for one in payloads], "held": held, "unnamed": unnamed}
        for name, (payloads, held, unnamed) in records.items()
    }
    FRAMES.write_text(json.dumps(written, indent=0) + "\n")


if __name__ == "__main__":
    main()
