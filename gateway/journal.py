"""What of a stream has been said, event by event, so that another replica can go on with it. Pure.

Only whole events that are JSON pass; half of one is held until the rest comes, or dropped.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import orjson

from gateway.retries import names_content
from runtime.wire import TOKEN_IDS

EVENT_END = re.compile(rb"\n\n|\r\n\r\n|\r\r")
DATA = re.compile(rb"(?:^|[\r\n])data:[ ]?([^\r\n]*)")
MIXED = ""  # the fingerprint of what several have said that are not made of the same
SAID_MAX_CHARS = 2**20  # an answer longer than this is not gone on with

NOTHING: dict[str, Any] = {}

# Its bytes with their end; its JSON, None: it has none; the tokens that were told for it.
Event = tuple[bytes, dict[str, Any] | None, list[int]]


class Journal:
    """One answer as its client has it."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}  # id, created, model: of the first chunk
        self.fingerprint: str | None = None  # of what has said all of it, where it tells
        self.text: list[str] = []
        self.ids: list[int] = []  # of the text, where the replica tells them
        self.guessed: int | None = None  # of these, by a draft, where the replica marks them
        self.rejected = 0  # beside them
        self.exact = True  # `ids` are all that was said
        self.chunks = 0  # that had text: about as many tokens
        self.opened = False  # the role has been told
        self.plain = True  # nothing but text, and not too much of it
        self.finished = False
        self.done = False
        self.fault: str | None = None  # what is wrong with the event that came next
        self._rest = b""
        self._told: list[int] = []  # of the event that comes next
        self._held: list[int] = []  # of events before the next one that goes to the client
        self._chars = 0

    def take(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes, up to the first one that is none."""
        data = self._rest + piece if self._rest else piece
        if data.startswith(TOKEN_IDS) and (end := data.find(b"\n\n")) >= 0:
            self._read(data[: end + 2])
            data = data[end + 2 :]
        if data.startswith(b"data: {") and data.find(b"\n\n") == len(data) - 2:
            with suppress(orjson.JSONDecodeError):  # what almost every read is: one event, whole
                chunk = orjson.loads(data[6:])
                if "error" not in chunk:
                    self._rest = b""
                    return [(data, chunk, self._of_this())]
        events: list[Event] = []
        begin = 0
        for found in EVENT_END.finditer(data):
            event = data[begin : found.end()]
            begin = found.end()
            try:
                entry = self._read(event)
            except ValueError as error:
                self.fault = str(error)
                break
            if entry is not None:
                events.append(entry)
        self._rest = data[begin:]
        return events

    def _of_this(self) -> list[int]:
        ids, self._told = self._told, []
        return ids

    def _read(self, event: bytes) -> Event | None:
        """One event; None for what is meant for us alone. Raises ValueError for no event."""
        if event.startswith(TOKEN_IDS):
            self._told += [int(one) for one in event[len(TOKEN_IDS) :].split(b",")]
            return None
        found = DATA.search(event)
        if found is None:
            if event.lstrip(b"\r\n").startswith((b":", b"event:", b"id:", b"retry:")):
                return event, None, []
            raise ValueError("it sent what is no event")
        if found[1].strip() == b"[DONE]":
            self.done = True
            return event, None, []
        try:
            chunk = orjson.loads(found[1])
        except orjson.JSONDecodeError:
            raise ValueError("it sent an event that is not JSON") from None
        if not isinstance(chunk, dict):
            raise ValueError("it sent an event that is no chunk")
        if isinstance(chunk.get("error"), dict) and not names_content(found[1]):
            raise ValueError(f"it sent an error: {str(chunk['error'].get('message'))[:200]}")
        return event, chunk, self._of_this()

    def hold(self, ids: list[int]) -> None:
        """Tokens of a chunk that the client has already, or gets with the next one."""
        self._held += ids

    def note(self, chunk: dict[str, Any], ids: list[int]) -> None:
        """A chunk that goes to the client, and its tokens."""
        if not self.head:
            self.head = {name: chunk[name] for name in ("id", "created", "model") if name in chunk}
            self.fingerprint = chunk.get("system_fingerprint")
        if self._held:
            self.ids += self._held
            self._held.clear()
        self.ids += ids
        if (marks := chunk.get("headgate")) is not None:
            self._mark(marks)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or NOTHING
            text = delta.get("content") or choice.get("text")
            if text:
                self.text.append(text)
                self.chunks += 1
                self._chars += len(text)
            if choice.get("finish_reason") is not None:
                self.finished = True
            for name in delta:
                if name == "role":
                    self.opened = True
                elif name != "content" and delta[name]:
                    self.plain = False
            if self._chars > SAID_MAX_CHARS:
                self.plain = False

    def _mark(self, marks: Any) -> None:
        """What a chunk tells of a draft's part in it (`x-headgate-marks`)."""
        with suppress(TypeError, KeyError):  # of another server, whatever it means by it
            guessed, rejected = marks["guessed"] + 0, marks["rejected"] + 0
            self.guessed = (self.guessed or 0) + guessed
            self.rejected += rejected

    def begin_again(self, *, ids: list[int] | None) -> None:
        """Another stream goes on; `ids` are those before its first token, None: not known."""
        self._rest, self.fault = b"", None
        self._told.clear()
        self._held.clear()
        self.ids = ids or []
        self.exact = ids is not None

    @property
    def said(self) -> str:
        return "".join(self.text)
