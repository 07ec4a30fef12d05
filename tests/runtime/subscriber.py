"""A subscriber of block events, as a router would write one; knows nothing of our code."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec
import zmq

LIMIT_S = 20.0
END = b"\xff" * 8


@dataclass
class Known:
    """What a subscriber believes of one engine, brought up to date by batches in their order.

    `blocks` are those of the engine's own pool, `below` those of its tiers by their medium.
    """

    blocks: dict[int, dict[str, Any]] = field(default_factory=dict)
    below: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    last: int = -1
    gaps: list[tuple[int, int]] = field(default_factory=list)
    orphans: int = 0

    def apply(self, payload: bytes) -> None:
        _, events, _ = msgspec.msgpack.decode(payload)
        for event in events:
            match event.pop("type"):
                case "AllBlocksCleared":
                    self.blocks.clear()
                    self.below.clear()
                case "BlockRemoved":
                    for one in event["block_hashes"]:
                        self._of(event["medium"]).pop(one, None)
                case "BlockStored":
                    self._store(event)

    def _of(self, medium: str) -> dict[int, dict[str, Any]]:
        return self.blocks if medium == "GPU" else self.below.setdefault(medium, {})

    def _store(self, event: dict[str, Any]) -> None:
        parent, size = event["parent_block_hash"], event["block_size"]
        hashes, tokens = event["block_hashes"], event["token_ids"]
        assert len(tokens) == size * len(hashes)
        assert len(event["extra_keys"]) == len(hashes)
        blocks = self._of(event["medium"])
        if blocks is self.blocks:  # a tier may have a block without those before it
            self.orphans += parent is not None and parent not in blocks
        for at, one in enumerate(hashes):
            blocks[one] = {
                "parent": parent,
                "tokens": tuple(tokens[at * size : (at + 1) * size]),
                "adapter": event["lora_name"],
                "extra": event["extra_keys"][at],
            }
            parent = one

    def take(self, seq: int, payload: bytes, *, replayed: bool = False) -> None:
        """One batch; duplicates of what is known already are skipped, a gap is noted."""
        if seq <= self.last:
            return
        if seq != self.last + 1 and not replayed:
            self.gaps.append((self.last + 1, seq))
            return
        self.apply(payload)
        self.last = seq


class Subscriber:
    """The sockets of one subscriber: live batches, and replays."""

    def __init__(
        self, endpoint: str, replay_endpoint: str | None, *, topic: str = "", hwm: int = 1000
    ) -> None:
        self.known = Known()
        self.context = zmq.Context()
        self.live = self.context.socket(zmq.SUB)
        self.live.set_hwm(hwm)
        self.live.setsockopt(zmq.RCVBUF, 4096)
        self.live.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.live.connect(endpoint)
        self.asker = self.context.socket(zmq.DEALER)
        if replay_endpoint is not None:
            self.asker.connect(replay_endpoint)

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.context.destroy(linger=0)

    def receive(self, wait_s: float = LIMIT_S) -> tuple[bytes, int, bytes] | None:
        """Topic, number, payload of the next live batch; None when none comes."""
        if not self.live.poll(wait_s * 1000):
            return None
        topic, seq, payload = self.live.recv_multipart()
        assert len(seq) == 8
        return topic, int.from_bytes(seq, "big"), payload

    def replay(self, start: int) -> list[tuple[bytes, int, bytes]]:
        """All that a replay from `start` gives, without its end marker."""
        self.asker.send_multipart([b"", start.to_bytes(8, "big")])
        found = []
        while True:
            assert self.asker.poll(LIMIT_S * 1000), "the replay has no end"
            empty, topic, seq, payload = self.asker.recv_multipart()
            assert empty == b""
            if seq == END:
                assert (topic, payload) == (b"", b"")
                return found
            found.append((topic, int.from_bytes(seq, "big"), payload))

    def catch_up(self) -> None:
        """Fills what is missing by a replay."""
        for _, seq, payload in self.replay(self.known.last + 1):
            self.known.take(seq, payload, replayed=True)

    def listen(self, until_seq: int) -> None:
        """Takes live batches, filling gaps by replays, until a batch is known."""
        end = time.monotonic() + LIMIT_S
        while self.known.last < until_seq:
            assert time.monotonic() < end, f"batch {until_seq} did not come"
            batch = self.receive(0.05)
            if batch is None:
                self.catch_up()  # the last one may have been missed, which no gap tells
                continue
            gaps = len(self.known.gaps)
            self.known.take(batch[1], batch[2])
            if len(self.known.gaps) > gaps:
                self.catch_up()
