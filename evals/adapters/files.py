"""Files that other tools leave behind, read; what is none is refused with its file and line.

Knows JSON and folders; knows no tool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from telemetry import Observation

FILE_BYTES_MAX = 2**31


class NoRun(Exception):
    """A file that the tool did not write; its text is `file:line  problem`."""

    def __init__(self, file: Path | str, problem: str, line: int | None = None) -> None:
        super().__init__(f"{file}:{line}  {problem}" if line else f"{file}  {problem}")


class EmptyRun(NoRun):
    """A run that answered nothing: there is nothing to compare, and that is no pass."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a tool saw. `name` is of the task or load; `digest` of the files' bytes."""

    name: str
    observations: tuple[Observation, ...]
    digest: str
    versions: Mapping[str, str]


def files_of(path: Path, pattern: str) -> list[Path]:
    """The file itself, or those in the folder and below it that a pattern fits, by name.

    Raises NoRun where there is none.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise NoRun(path, "no such file or folder")
    found = sorted(one for one in path.rglob(pattern) if one.is_file())
    if not found:
        raise NoRun(path, f"is a folder without a file {pattern}")
    return found


def bytes_of(file: Path) -> bytes:
    """Raises NoRun."""
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            raise NoRun(file, f"is larger than {FILE_BYTES_MAX} bytes")
        return file.read_bytes()
    except OSError as error:
        raise NoRun(file, f"cannot be read: {error.strerror}") from None


def object_in(file: Path, data: bytes) -> dict[str, Any]:
    """Raises NoRun."""
    try:
        given = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        line = data.count(b"\n", 0, error.pos) + 1
        raise NoRun(file, f"is not JSON: {error.msg}", line) from None
    if not isinstance(given, dict):
        raise NoRun(file, "expected a JSON object")
    return given


def lines_in(file: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and object of a JSONL file. Raises NoRun."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            given = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise NoRun(file, f"is not JSON: {error.msg}", number) from None
        if not isinstance(given, dict):
            raise NoRun(file, "expected a JSON object", number)
        yield number, given


def digest_of(files: Mapping[Path, bytes]) -> str:
    """Of all of them, whatever their names."""
    each = sorted(hashlib.sha256(data).hexdigest() for data in files.values())
    return hashlib.sha256("".join(each).encode()).hexdigest()


def numbered(blocks: Sequence[Sequence[Observation]]) -> tuple[Observation, ...]:
    """Requests by their place: loads have no names for them. The earliest block is the first."""
    ordered = sorted(filter(None, blocks), key=lambda block: min(one.at_s for one in block))
    begin = min(one.at_s for block in ordered for one in block)
    told = []
    for number, block in enumerate(ordered):
        for place, one in enumerate(sorted(block, key=lambda one: one.at_s)):
            name = f"{number:03d}-{place:06d}"
            told.append(
                replace(
                    one,
                    id=name,
                    cluster=f"{number:03d}-{one.cluster}" if one.cluster else name,
                    block=number,
                    at_s=one.at_s - begin,
                )
            )
    return tuple(told)


def share(value: Any) -> float | None:
    """A score of another tool as one in [0, 1]: its letters, truth values, numbers. None where it
    is none."""
    if isinstance(value, str):
        return _LETTERS.get(value.strip().upper())
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float) and 0 <= value <= 1:
        return float(value)
    return None


# Correct, partly, incorrect, no answer: inspect_ai's value_to_float.
_LETTERS = {
    "C": 1.0,
    "P": 0.5,
    "I": 0.0,
    "N": 0.0,
    "YES": 1.0,
    "NO": 0.0,
    "TRUE": 1.0,
    "FALSE": 0.0,
}


def count(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
