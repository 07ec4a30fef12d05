"""Lines for a person, and one line of progress that gives way to them. Knows no command."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

NAME_MAX = 46  # columns for a name
_GONE = (errno.EPIPE, errno.EIO)  # a reader that left, a terminal that was closed


def columns(rows: Iterable[Sequence[str]], indent: str = "  ") -> list[str]:
    """Rows as lines with aligned columns; the last column is as long as it wants."""
    table = [tuple(row) for row in rows]
    count = max((len(row) for row in table), default=0)
    widths = [
        max((wide(row[at]) for row in table if at < len(row)), default=0) for at in range(count)
    ]
    return [
        indent + "  ".join(map(padded, row, widths)).rstrip()  # the shorter one ends it
        for row in table
    ]


def wide(text: str) -> int:
    """How many columns of a terminal it takes: letters of East Asia and pictures take two."""
    if text.isascii():
        return len(text)
    return sum(
        2 if unicodedata.east_asian_width(one) in "WF" else 0 if unicodedata.combining(one) else 1
        for one in text
    )


def padded(text: str, width: int) -> str:
    return text + " " * (width - wide(text))


def cut(name: str, most: int = NAME_MAX) -> str:
    """Names may be as long as whoever asked made them."""
    if wide(name) <= most:
        return name
    while wide(name) >= most:
        name = name[: max(0, most - 1)] if len(name) > most else name[:-1]
    return name + "…"


def ms(seconds: float) -> str:
    """As people read it."""
    return f"{1000 * seconds:,.2f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def plain(line: str) -> str:
    """Without what a terminal would obey: names and reasons are whatever others write."""
    return "".join(one if one.isprintable() else "?" for one in line)


def size(count: float) -> str:
    """Bytes as people read them: `1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Screen:
    """Announcements on stdout, children's words on stderr; a reader that left is no error."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._alive = self._out.isatty()
        self._progress = ""

    def say(self, *lines: str) -> None:
        self._write(self._out, lines)

    def log(self, *lines: str) -> None:
        self._write(self._err, lines)

    def progress(self, text: str) -> None:
        """Replaces the last progress line; nothing where nobody watches."""
        if self._alive:
            # A line that wraps could not be taken back.
            self._progress = text[: shutil.get_terminal_size().columns - 1]
            self._put(self._out, f"\r\x1b[K{self._progress}")

    def settle(self) -> None:
        """Forgets the progress line."""
        if self._progress:
            self._progress = ""
            self._put(self._out, "\r\x1b[K")

    def _write(self, stream: TextIO, lines: Sequence[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        if self._progress:
            self._put(self._out, "\r\x1b[K")
        self._put(stream, text)
        if self._progress:
            self._put(self._out, self._progress)

    def _put(self, stream: TextIO, text: str) -> None:
        try:
            try:
                stream.write(text)
            except UnicodeEncodeError:  # a terminal without UTF-8
                stream.write(text.encode("ascii", "replace").decode())
            stream.flush()
        except OSError as error:  # what a screen cannot show must not end what is being served
            if error.errno in _GONE:
                _forget(stream)


def _forget(stream: TextIO) -> None:
    """Sends the rest nowhere: what is still buffered would spoil the exit code (library/signal)."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
