"""The folders of the disk tier: whose blocks lie where, who may write there, and what is to go.

    <path>/<layout>/about.json     what the blocks belong to: `layout` is a digest of it
    <path>/<layout>/0, 1, ...      one folder for each process that writes at the same time

A layout differs with the model, the format of its keys and values and the format of these files, so
that nothing foreign is ever read. Folders that nobody has used for a week are removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from cache.slot_file import SlotFile, SlotView, Taken, digest_of, hold

log = logging.getLogger(__name__)

FORMAT = 1
KEEP_S = 7 * 24 * 3600.0  # how long folders that nobody uses stay
_WRITERS_MAX = 256
_ABOUT = "about.json"


def layout_of(identity: Mapping[str, Any], block_bytes: int) -> tuple[str, str]:
    """The layout's name, and the text of its `about.json`."""
    about = {"headgate_kv": FORMAT, "block_bytes": block_bytes, **identity}
    text = json.dumps(about, indent=1, sort_keys=True) + "\n"
    return sha256(text.encode()).hexdigest()[:16], text


def claim(layout: Path, about: str, block_bytes: int, limit_bytes: int) -> SlotFile | None:
    """The first folder of a layout that no other process writes to; None when there is none.

    Raises OSError, also for a layout that says something else than `about`.
    """
    _check_about(layout, about)
    for number in range(_WRITERS_MAX):
        folder = layout / str(number)
        with contextlib.suppress(Taken):
            return SlotFile(folder, block_bytes=block_bytes, limit_bytes=limit_bytes)
    return None


def _check_about(layout: Path, about: str) -> None:
    path = layout / _ABOUT
    layout.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        said = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        draft = path.with_name(f"{_ABOUT}.{os.getpid()}")
        draft.write_text(about, encoding="utf-8")
        draft.replace(path)
        return
    if said != about:
        raise FileExistsError(f"{path} is not of this model and format; remove its folder")


def neighbours(
    layout: Path, own: Path | None, known: Iterable[SlotView], block_bytes: int
) -> list[SlotView]:
    """What other processes have stored in a layout: the `known` ones again, looked at, and new
    ones."""
    before = {view.folder: view for view in known}
    views = []
    with contextlib.suppress(OSError):  # no folder, no others; writing to it tells why
        for folder in sorted(layout.iterdir()):
            if folder == own or not folder.name.isdecimal():
                continue
            view = before.get(folder) or SlotView(folder, block_bytes=block_bytes)
            with contextlib.suppress(OSError):  # just made, just removed, or another user's
                view.refresh()
                views.append(view)
    return views


def read_rate(probe: Path, block_bytes: int, size: int) -> float:
    """Bytes a second of reading blocks and checking them, from a file of `size` written for that.

    Raises OSError.
    """
    blocks = max(1, size // block_bytes)
    data = os.urandom(block_bytes)
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        probe.unlink()
        for _ in range(blocks):
            os.write(descriptor, data)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        for at in range(blocks):
            digest_of(b"", os.pread(descriptor, block_bytes, at * block_bytes))
        return blocks * block_bytes / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


def remove_unused(path: Path, now: float) -> None:
    """Removes our folders that nobody has used for a week, of any model; never a foreign file."""
    try:
        layouts = [one.parent for one in path.glob(f"*/{_ABOUT}")]
        for layout in layouts:
            if not _is_ours(layout / _ABOUT):
                continue
            for folder in layout.iterdir():
                if folder.name.isdecimal() and now - _last_use(folder) > KEEP_S:
                    _remove_unless_held(folder)
            rest = [one.name for one in layout.iterdir()]
            if rest == [_ABOUT] and now - (layout / _ABOUT).stat().st_mtime > KEEP_S:
                (layout / _ABOUT).unlink()
                layout.rmdir()
    except OSError as error:
        log.info("old folders in %s stay for now: %s", path, error)


def _is_ours(about: Path) -> bool:
    try:
        return "headgate_kv" in json.loads(about.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        return False


def _last_use(folder: Path) -> float:
    files = [one for one in (folder / "lock", folder / "index") if one.exists()]
    return max((one.stat().st_mtime for one in files), default=folder.stat().st_mtime)


def _remove_unless_held(folder: Path) -> None:
    try:
        held = hold(folder / "lock")
    except Taken:
        return
    try:
        shutil.rmtree(folder)
    finally:
        os.close(held)
