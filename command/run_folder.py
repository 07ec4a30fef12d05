"""A folder of one run, for as long as it lasts; what runs that were killed left is removed.

The owner holds a lock (flock) on a file in its folder: a lock ends with the process that holds it,
whatever ended that, and is seen from other containers that share the file system, too. Knows
nothing of what else lies in the folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

PREFIX = "headgate-"
LOCK = "owner.lock"


@contextmanager
def own_folder(prefix: str = PREFIX) -> Iterator[Path]:
    """A new folder of this user alone, gone afterwards. Removes those of owners that are dead."""
    remove_abandoned(prefix)
    lock = None
    try:
        with TemporaryDirectory(prefix=prefix) as name:
            lock = _taken(Path(name))
            yield Path(name)
    finally:
        if lock is not None:
            os.close(lock)


def remove_abandoned(prefix: str = PREFIX) -> None:
    """Folders of this user whose owner has died. One without a lock is nobody's that is known: of
    another program, or of a run that is about to begin."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if not _is_ours(folder):
            continue
        with suppress(OSError):  # held by its owner, who lives; or gone meanwhile
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Follows no link, below it either: one that has come in its place is left alone.
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder, and no link to one, that nobody but this user may enter."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    private = not stat.S_IMODE(found.st_mode) & 0o077
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and private


def _taken(folder: Path) -> int | None:
    """The lock, which children do not inherit; None on a file system that has none, where the
    folder stays if this run is killed."""
    begun = folder / f"{LOCK}.new"
    lock = os.open(begun, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begun.rename(folder / LOCK)  # under this name it is held from the first moment
    except OSError:
        os.close(lock)
        return None
    return lock
