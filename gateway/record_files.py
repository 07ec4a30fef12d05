"""Recorded lines on the disk: within bounds, readable by nobody else, a conversation a line.

A line is written as it comes, into a file `.part`; when that is closed its lines are put together
by conversation. Knows files and lines; knows nothing of what a span says.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

SUFFIX = ".jsonl"
PART = ".jsonl.part"
SALT_NAME = ".salt"
HEAD = b'{"trace_id":"%s","spans":['
TAIL = b"]}\n"
HEAD_BYTES = len(HEAD % (b"0" * 32))


def line_of(trace_id: str, span: bytes) -> bytes:
    """One span as a line of its own."""
    return HEAD % trace_id.encode() + span + TAIL


def by_conversation(lines: list[bytes]) -> list[bytes]:
    """One line for each conversation, in the order in which they began; half a line is left out."""
    spans: dict[bytes, list[bytes]] = {}
    for line in lines:
        if line.endswith(TAIL) and line.startswith(HEAD[:13]):
            spans.setdefault(line[:HEAD_BYTES], []).append(line[HEAD_BYTES : -len(TAIL)])
    return [head + b",".join(those) + TAIL for head, those in spans.items()]


class Files:
    """The folder as one process writes it; others may write theirs beside it."""

    def __init__(self, folder: Path, file_bytes: int, max_bytes: int) -> None:
        """Raises OSError for a folder that cannot be."""
        self.folder = folder
        self._file_bytes = file_bytes
        self._max_bytes = max_bytes
        self._part: Path | None = None
        self._descriptor = -1
        self._size_bytes = 0
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_over()

    def write(self, line: bytes) -> None:
        """Raises OSError. A line that no file could hold is written to a file of its own."""
        if self._part is not None and self._size_bytes + len(line) > self._file_bytes:
            self.close()
        if self._part is None:
            self._begin()
        view = memoryview(line)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._size_bytes += len(line)

    def close(self) -> None:
        """Ends the file that is written, and lets the oldest ones go."""
        if self._part is None:
            return
        part, self._part = self._part, None
        _finish(part)
        os.close(self._descriptor)
        self._keep_within()

    def salt(self) -> bytes:
        """What the names of conversations are made with, the same for all who write here."""
        path = self.folder / SALT_NAME
        new = self.folder / f"{SALT_NAME}-{os.getpid()}"
        descriptor = os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.write(descriptor, os.urandom(16))
        os.close(descriptor)
        with suppress(FileExistsError):
            os.link(new, path)  # only the first one's is taken
        new.unlink()
        return path.read_bytes()

    def _begin(self) -> None:
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        name = f"{moment}-{os.getpid()}-{self._count:04d}{PART}"
        self._count += 1
        self._part = self.folder / name
        self._descriptor = os.open(self._part, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._size_bytes = 0

    def _take_over(self) -> None:
        """Finishes what a process that was killed has left; of a living one the lock is held."""
        for part in sorted(self.folder.glob(f"*{PART}")):
            with suppress(OSError):
                descriptor = os.open(part, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _finish(part)
                finally:
                    os.close(descriptor)

    def _keep_within(self) -> None:
        """Room is kept for this process's next file, for one that is just being put together, and
        for those that others write. What another process removed first is gone too."""
        written = 2 + sum(1 for _ in self.folder.glob(f"*{PART}"))
        files: list[tuple[Path, int]] = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            with suppress(FileNotFoundError):
                files.append((path, path.stat().st_size))
        total = sum(size for _, size in files)
        for path, size in files:
            if total + written * self._file_bytes <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _finish(part: Path) -> None:
    """A file is there whole or not at all, whatever happens meanwhile."""
    with part.open("rb") as stream:
        lines = by_conversation(stream.readlines())
    done = part.with_name(part.name.removesuffix(PART) + SUFFIX)
    fresh = done.with_name(done.name + ".new")
    descriptor = os.open(fresh, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.writelines(lines)
    if lines:
        fresh.replace(done)
    else:
        fresh.unlink()
    part.unlink(missing_ok=True)
