"""KV blocks in one file of equal slots, found by an index beside it that carries their checksums.

A folder of three files: `blocks`, `index` with one entry a slot, and `lock`, which the process that
writes here holds; anybody may read. Nothing is ever synced: a block that a crash, a full disk or
another process left unfinished does not match its checksum, and a block can always be computed
again. Slots are overwritten in place, because removing a file costs more than writing a block.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest, xxh3_128

_PAGE = 4096
# key, digest of key and block, age (higher is newer), digest of these and of the slot's number.
_ENTRY = struct.Struct("<32s16sQQ")
_SEALED = _ENTRY.size - 8
_NO_ENTRY = bytes(_ENTRY.size)


class Damaged(Exception):
    """What a slot holds is not what was stored there."""


class Taken(Exception):
    """Another process writes to this folder."""


@dataclass(frozen=True, slots=True)
class Entry:
    slot: int
    digest: bytes
    age: int


def digest_of(key: bytes, data: bytes | memoryview) -> bytes:
    """Of key and block together, so that a sound block in another one's slot is found out."""
    state = xxh3_128(key)
    state.update(data)
    return state.digest()


def slot_bytes(block_bytes: int) -> int:
    """What a block takes on disk: whole pages, so that no two blocks share one."""
    return -(-block_bytes // _PAGE) * _PAGE


def read_index(path: Path, slots: int) -> dict[bytes, Entry]:
    """Every entry that is whole, of the first `slots`. Raises OSError."""
    entries: dict[bytes, Entry] = {}
    raw = path.read_bytes()[: slots * _ENTRY.size]
    for slot in range(len(raw) // _ENTRY.size):
        at = slot * _ENTRY.size
        key, digest, age, seal = _ENTRY.unpack_from(raw, at)
        if seal != xxh3_64_intdigest(raw[at : at + _SEALED], seed=slot):
            continue
        known = entries.get(key)
        if known is None or known.age < age:
            entries[key] = Entry(slot, digest, age)
    return entries


class SlotFile:
    """The folder that this process writes to. One thread may write while another one reads.

    Raises Taken when another process has it, OSError whenever the operating system does.
    """

    def __init__(self, folder: Path, *, block_bytes: int, limit_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._slot_bytes = slot_bytes(block_bytes)
        self._slots = limit_bytes // self._slot_bytes
        if self._slots < 2:  # one may be read while the other is written
            raise ValueError(
                f"{limit_bytes} bytes hold fewer than two blocks of {block_bytes} bytes"
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.gone: Callable[[bytes], None] | None = None  # is told what goes, in whatever thread
        self._lock = threading.Lock()
        self._held = hold(folder / "lock")
        try:
            self._index = os.open(folder / "index", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                self._blocks = os.open(folder / "blocks", os.O_RDWR | os.O_CREAT, 0o600)
            except BaseException:
                os.close(self._index)
                raise
        except BaseException:
            os.close(self._held)
            raise
        self._open = True
        self._reading: int | None = None  # the slot that must not be overwritten now
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # next out first
        self._load()

    def _load(self) -> None:
        """Finds again what an earlier process stored here, as far as limit and file reach."""
        limit = self._slots * self._slot_bytes
        held = os.fstat(self._blocks).st_size
        if held > limit:
            os.ftruncate(self._blocks, limit)
            os.ftruncate(self._index, self._slots * _ENTRY.size)
        whole = min(self._slots, (held + self._slot_bytes - self._block_bytes) // self._slot_bytes)
        found = read_index(self.folder / "index", whole)
        self._entries.update(sorted(found.items(), key=lambda one: one[1].age))
        self._age = max((entry.age for entry in found.values()), default=0)
        used = {entry.slot for entry in found.values()}
        self._grown = max(used, default=-1) + 1
        self._free = [slot for slot in range(self._grown) if slot not in used]

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def keys(self) -> list[bytes]:
        """All that is here, the next one to go first."""
        with self._lock:
            return list(self._entries)

    @property
    def in_place(self) -> bool:
        """False once the folder was removed or replaced under us."""
        try:
            return os.path.samestat((self.folder / "index").stat(), os.fstat(self._index))
        except OSError:
            return False

    def write(self, key: bytes, data: bytes | memoryview) -> int:
        """Stores a block in a free slot or in place of the least recently used one.

        Gives the number of blocks that had to go: 0 or 1.
        """
        assert len(data) == self._block_bytes, f"{len(data)} bytes are not a block"
        with self._lock:
            slot, evicted = self._claim()
            self._age += 1
            entry = Entry(slot, digest_of(key, data), self._age)
        try:
            _write_all(self._blocks, data, slot * self._slot_bytes)
            self._write_entry(key, entry)
        except BaseException:
            with self._lock:
                self._free.append(slot)
            raise
        with self._lock:
            self._entries[key] = entry
        return evicted

    def expect(self, keys: Iterable[bytes]) -> None:
        """Tells the operating system what will be read, so that it reads ahead in parallel."""
        advise = getattr(os, "posix_fadvise", None)
        if advise is None:
            return
        with self._lock:
            entries = [self._entries[key] for key in keys if key in self._entries and self._open]
        with contextlib.suppress(OSError):  # closed meanwhile, or not that kind of file
            for entry in entries:
                at = entry.slot * self._slot_bytes
                advise(self._blocks, at, self._block_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, key: bytes) -> bytes | None:
        """A block as it was stored; None when it is not here. Raises Damaged and forgets it."""
        with self._lock:
            entry = self._entries.get(key) if self._open else None
            if entry is None:
                return None
            self._reading = entry.slot
        try:
            data = os.pread(self._blocks, self._block_bytes, entry.slot * self._slot_bytes)
            if len(data) == self._block_bytes and digest_of(key, data) == entry.digest:
                self._touch(key, entry)
                return data
            self._forget(key, entry)
        finally:
            with self._lock:
                self._reading = None
                closing = not self._open
            if closing:
                self._close_files()
        raise Damaged(f"slot {entry.slot} of {self.folder / 'blocks'}")

    def touch(self, key: bytes) -> None:
        """Counts as a use, for this process: the next one goes by what was written and read."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)

    def forget(self, keys: Iterable[bytes] | None) -> int:
        """Removes blocks, or all; gives their number. For the thread that writes."""
        with self._lock:
            gone = list(self._entries.items())
            if keys is not None:
                gone = [(key, self._entries[key]) for key in keys if key in self._entries]
        for key, entry in gone:
            self._forget(key, entry)
        return len(gone)

    def close(self) -> None:
        """Lets others write here; a read that is under way ends well."""
        with self._lock:
            closing = self._open and self._reading is None
            self._open = False
        if closing:
            self._close_files()

    # ---- inside ----------------------------------------------------------------------------------

    def _claim(self) -> tuple[int, int]:
        """A slot that nobody reads, and how many blocks had to go for it; under the lock."""
        if self._free:
            return self._free.pop(), 0
        if self._grown < self._slots:
            self._grown += 1
            return self._grown - 1, 0
        key, entry = next(one for one in self._entries.items() if one[1].slot != self._reading)
        del self._entries[key]
        if self.gone is not None:
            self.gone(key)
        return entry.slot, 1

    def _touch(self, key: bytes, entry: Entry) -> None:
        with self._lock:
            if self._entries.get(key) is not entry:
                return
            self._age += 1
            entry = Entry(entry.slot, entry.digest, self._age)
            self._entries[key] = entry
            self._entries.move_to_end(key)
        with contextlib.suppress(OSError):  # then it only seems older to the next process
            self._write_entry(key, entry)

    def _forget(self, key: bytes, entry: Entry) -> None:
        with self._lock:
            if self._entries.get(key) is not entry:
                return
            del self._entries[key]
            self._free.append(entry.slot)
        if self.gone is not None:
            self.gone(key)
        os.pwrite(self._index, _NO_ENTRY, entry.slot * _ENTRY.size)

    def _write_entry(self, key: bytes, entry: Entry) -> None:
        open_part = _ENTRY.pack(key, entry.digest, entry.age, 0)[:_SEALED]
        seal = xxh3_64_intdigest(open_part, seed=entry.slot)
        _write_all(self._index, open_part + seal.to_bytes(8, "little"), entry.slot * _ENTRY.size)

    def _close_files(self) -> None:
        for descriptor in (self._index, self._blocks, self._held):
            os.close(descriptor)


def hold(path: Path) -> int:
    """A descriptor that keeps every other process out until it is closed. Raises Taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.utime(descriptor)
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
        raise Taken(f"{path.parent} was removed a moment ago")
    except BlockingIOError as error:
        os.close(descriptor)
        raise Taken(f"{path.parent} belongs to another process") from error
    except BaseException:
        os.close(descriptor)
        raise


def _write_all(descriptor: int, data: bytes | memoryview, at: int) -> None:
    """pwrite, again for what it left; a full disk takes a part before it refuses."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


class SlotView:
    """Another process's folder, to be read only; what was overwritten meanwhile is not found."""

    def __init__(self, folder: Path, *, block_bytes: int) -> None:
        self.folder = folder
        self._block_bytes = block_bytes
        self._entries: dict[bytes, Entry] = {}
        self._seen: tuple[int, int] | None = None

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def refresh(self) -> None:
        """Reads the index again when it has changed. Raises OSError."""
        path = self.folder / "index"
        status = path.stat()
        seen = (status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            self._entries = read_index(path, status.st_size // _ENTRY.size)
            self._seen = seen

    def read(self, key: bytes) -> bytes | None:
        """The block, or None where it is gone, whatever the reason."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        try:
            with (self.folder / "blocks").open("rb", buffering=0) as file:
                file.seek(entry.slot * slot_bytes(self._block_bytes))
                data = file.read(self._block_bytes)
        except OSError:  # it is another process's to tell
            self._entries = {}
            return None
        if len(data) == self._block_bytes and digest_of(key, data) == entry.digest:
            return data
        self._entries.pop(key, None)
        return None
