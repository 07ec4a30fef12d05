"""A client in a process of its own: so many requests at once over raw sockets, each of a new trace;
tells as JSON when each was sent and when its last byte came, by its own clock and the kernel's,
which knows what a process loses while it waits for a core.

python traced_client.py PORT AT_ONCE TURNS KIND...
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import Any

# Linux tells when what is read had come to the socket (SO_TIMESTAMPNS), and when what was written
# left it (SO_TIMESTAMPING: by software, of what is sent, without the packet).
TIMESTAMPS, SENT = 35, 37
OF_SENT = 1 << 1 | 1 << 4 | 1 << 11
# Kinds, each of which is its request's message: an answer whose deadline passes, a stream whose
# does, one that its client leaves, whole ones; and what a test's own replica does to them.
FAULT, LATE, LEAVES, WHOLE = "fault", "late", "leaves", "whole"
FAILS, CUT, RESCUED = "fails", "cut", "rescued"
LONG = (FAULT, LATE, LEAVES)


class Talk:
    """One request on one connection."""

    def __init__(self, port: int, what: str) -> None:
        self.what = what
        self.trace_id = secrets.token_hex(16)
        self.heard = b""
        self.ended = self.reached = 0.0
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        request = self._request()
        self.began = time.time()
        self.sent = send(self.sock, request)

    def _request(self) -> bytes:
        body = json.dumps(
            {
                "model": "pocket", "messages": [{"role": "user", "content": self.what}],
                "stream": self.what != FAULT, "max_tokens": 2000 if self.what in LONG else 8,
                "ignore_eos": True, "temperature": 0,
                "n": 2 if self.what == CUT else 1,  # which no other replica goes on with
            }
        ).encode()  # fmt: skip
        deadline = "x-slo-deadline-ms: 300\r\n" if self.what in (FAULT, LATE) else ""
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            f"content-length: {len(body)}\r\n{deadline}"
            f"traceparent: 00-{self.trace_id}-{secrets.token_hex(8)}-03\r\n\r\n"
        )
        return head.encode() + body

    def read(self) -> bool:
        """Whether there is more to come."""
        data, self.reached = receive(self.sock)
        self.ended = time.time()
        assert data, self.heard
        self.heard += data
        if self.what == LEAVES and self.heard.count(b"data: ") > 2:
            return False
        return not self.heard.endswith(b"0\r\n\r\n") and not self._is_whole()

    def _is_whole(self) -> bool:
        """Of an answer that is no stream."""
        head, _, body = self.heard.partition(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                return len(body) >= int(line.split(b":")[1])
        return False

    def told(self) -> dict[str, Any]:
        return {
            "trace_id": self.trace_id, "what": self.what, "began": self.began,
            "sent": self.sent, "reached": self.reached, "ended": self.ended,
        }  # fmt: skip


def send(sock: socket.socket, data: bytes) -> float:
    """When it went, by the kernel; what comes back will have its time, too."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, TIMESTAMPS, 1)
    sock.setsockopt(socket.SOL_SOCKET, SENT, OF_SENT)
    sock.sendall(data)
    return _stamp(sock.recvmsg(1, 512, socket.MSG_ERRQUEUE)[1], SENT)


def receive(sock: socket.socket) -> tuple[bytes, float]:
    """What has come, and when the last of it did, by the kernel; b"" where it has ended."""
    data, notes, _, _ = sock.recvmsg(2**16, 256)
    return data, _stamp(notes, TIMESTAMPS) if data else 0.0


def _stamp(notes: list[tuple[int, int, bytes]], wanted: int) -> float:
    """The kernel's own time among what it says of a read, or of a write."""
    for _, kind, note in notes:
        if kind == wanted:
            seconds, ns = struct.unpack("qq", note[:16])
            return float(seconds + ns / 1e9)
    raise AssertionError(f"the kernel has noted no time: {notes}")


def main(port: int, at_once: int, turns: int, kinds: Sequence[str]) -> None:
    wanted = [kinds[n % len(kinds)] for n in range(at_once * turns)]
    rows = []
    with selectors.DefaultSelector() as selector:

        def begin() -> None:
            if wanted:
                talk = Talk(port, wanted.pop())
                selector.register(talk.sock, selectors.EVENT_READ, talk)

        for _ in range(at_once):
            begin()
        while selector.get_map():
            for key, _ in selector.select(60):
                talk = key.data
                if not talk.read():
                    selector.unregister(talk.sock)
                    talk.sock.close()
                    rows.append(talk.told())
                    begin()
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*(int(one) for one in sys.argv[1:4]), sys.argv[4:])
