"""Choices between ways of computing the same, made once on each kind of machine and kept.

Knows a file and how processes take turns at it; knows neither layers nor how a way is measured. Two
measurements of nearly equal ways need not agree, and which way is taken decides how sums are
rounded: so the first worker that has to choose measures, and every other one, at the same time or
after a restart, reads what it found. A file that is cut or foreign costs another measurement.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from policies.model_facts import version
from runtime import native, processor

log = logging.getLogger(__name__)

FORMAT = 1
MACHINES_MAX = 64  # kinds of machines, torches and versions of ours that share a home
_BYTES_MAX = 2**22  # a file that is larger is not ours
# Others measure one question in seconds. A worker that was stopped meanwhile is not waited for.
_WAIT_S = 120.0
_POLL_S = 0.02
# Their source decides what is measured, and how.
_MEASURED = (
    "int8.py", "linear.cpp", "linear.py", "native_linear.py", "quantize.py", "timing.py",
)  # fmt: skip

_Kept = dict[str, dict[str, Any]]  # machine -> what it is, and what was chosen there


class Choices:
    """What was chosen on this kind of machine. One thread of a process at a time."""

    def __init__(
        self, file: Path, machine: Mapping[str, str | None], *, wait_s: float = _WAIT_S
    ) -> None:
        """`machine` is what a choice holds for, besides its question."""
        self._file = file
        self._machine = dict(machine)
        self._key = _digest(json.dumps(self._machine, sort_keys=True))
        self._wait_s = wait_s
        self._told = False  # that nothing can be kept
        self._made: dict[str, str] = {}  # in this process, whatever becomes of the file

    def make(self, question: str, among: Sequence[str], measure: Callable[[], str]) -> str:
        """The answer to a question, one of `among`: what stands in the file, else what `measure`
        finds, which then stands there. While one process measures, others wait for it."""
        name = f"{question}: {', '.join(among)}"
        if name not in self._made:
            self._made[name] = self._find(name, among, measure)
        return self._made[name]

    def _find(self, name: str, among: Sequence[str], measure: Callable[[], str]) -> str:
        with contextlib.suppress(OSError, ValueError, RecursionError):  # told below, in our turn
            if (chosen := self._chosen(self._read(), name)) in among:
                return str(chosen)
        found: str | None = None
        try:
            with _turn(self._file.with_suffix(".lock"), self._wait_s):
                kept = self._believed()
                chosen = self._chosen(kept, name)
                if chosen in among:
                    return str(chosen)
                if chosen is not None:
                    self._doubt(f"{chosen!r} is none of the ways of {name}")
                found = _measured(name, measure)
                self._keep(kept, name, found)
        except OSError as error:
            if not self._told:
                log.warning(
                    "the fastest ways of holding weights are not kept in %s (%s): another start "
                    "may choose otherwise, and have another fingerprint", self._file, error,
                )  # fmt: skip
            self._told = True
        return found or _measured(name, measure)

    def _chosen(self, kept: _Kept, name: str) -> object:
        return kept[self._key]["chosen"].get(name) if self._key in kept else None

    def _believed(self) -> _Kept:
        """What is kept; nothing where the file cannot be read as ours."""
        try:
            return self._read()
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            self._doubt(str(error))
            return {}

    def _read(self) -> _Kept:
        """Raises OSError, ValueError, RecursionError."""
        with self._file.open("rb") as stream:
            return _parse(stream.read(_BYTES_MAX + 1))

    def _doubt(self, why: str) -> None:
        log.warning("%s is not believed (%s): measured again", self._file, why)

    def _keep(self, kept: _Kept, name: str, chosen: str) -> None:
        """Raises OSError."""
        mine = kept.pop(self._key, {"machine": self._machine, "chosen": {}})
        mine["chosen"][name] = chosen
        newest = dict([*kept.items(), (self._key, mine)][-MACHINES_MAX:])
        half = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with half.open("w", encoding="utf-8") as stream:
            json.dump({"headgate_ways": FORMAT, "machines": newest}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        half.replace(self._file)


def ways_file() -> Path:
    """Where choices are kept: what HEADGATE_WAYS names, else beside compiled code."""
    named = os.environ.get("HEADGATE_WAYS")
    return Path(named) if named else native.cache_folder() / "ways.json"


def this_machine(*, compiles: bool) -> dict[str, str | None]:
    """What a choice holds for: the processor, torch, our own source, and who compiles it."""
    folder = Path(__file__).parent
    source = b"\0".join((folder / name).read_bytes() for name in _MEASURED)
    return {
        "processor": processor.name(),
        "features": processor.features(),
        "torch": version("torch"),
        "source": _digest(source),
        "compiler": native.compiler() if compiles else None,
    }


def _measured(name: str, measure: Callable[[], str]) -> str:
    chosen = measure()
    log.info("measured %s: %s", name, chosen)
    return chosen


def _digest(told: str | bytes) -> str:
    return hashlib.sha256(told.encode() if isinstance(told, str) else told).hexdigest()[:24]


def _parse(text: bytes) -> _Kept:
    """Raises ValueError."""
    if len(text) > _BYTES_MAX:
        raise ValueError(f"it has more than {_BYTES_MAX} bytes")
    told = json.loads(text)
    if not isinstance(told, dict) or told.get("headgate_ways") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    machines = told.get("machines")
    if not isinstance(machines, dict):
        raise ValueError("it names no machines")
    for one in machines.values():
        if not (isinstance(one, dict) and isinstance(one.get("chosen"), dict)):
            raise ValueError("a machine has chosen nothing")
    return machines


@contextlib.contextmanager
def _turn(file: Path, wait_s: float) -> Iterator[None]:
    """Nobody else has it until the end. Raises OSError, also where others have it for too long."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        ends = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= ends:
                    raise TimeoutError(f"another process has {file} for {wait_s:g} s") from None
            time.sleep(_POLL_S)
        yield  # the lock ends with the descriptor, and with the process
    finally:
        os.close(opened)
