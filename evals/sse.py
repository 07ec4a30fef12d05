"""Server-sent events as bytes come: data and comments, however they are cut and ended.

Knows the format (WHATWG HTML, 9.2.6); knows nothing of what the data means.
"""

from __future__ import annotations


class Events:
    """What one stream has said so far. Feed it bytes in the order they came."""

    __slots__ = ("_data", "_rest", "comments")

    def __init__(self) -> None:
        self.comments: list[bytes] = []
        self._rest = b""  # of a line that has no end yet
        self._data: list[bytes] = []  # of the event that has no end yet

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that is complete with this piece."""
        lines = (self._rest + piece).splitlines(keepends=True)
        self._rest = b""
        # A carriage return may be half of a line's end; a line without one may go on.
        if lines and not lines[-1].endswith(b"\n"):
            self._rest = lines.pop()
        found = []
        for line in lines:
            line = line.rstrip(b"\r\n")
            if not line:
                if self._data:
                    found.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b":"):
                self.comments.append(line[1:].removeprefix(b" "))
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return found
