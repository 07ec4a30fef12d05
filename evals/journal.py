"""What a run has done, a line a block in an arm, on disk before the next one begins.

A run that is killed goes on where its journal ends; a last line that is torn is cut off.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson

from evals.design import Step
from telemetry import Observation


class JournalError(Exception):
    """A journal that cannot be read, or that somebody else writes."""


@dataclass(frozen=True, slots=True)
class Done:
    """A block in an arm, asked and answered. `counters`: by how much those at /metrics rose."""

    source: str
    block: int
    arm: str
    observations: tuple[Observation, ...]
    counters: Mapping[str, float] = field(default_factory=dict)
    late_s: tuple[float, ...] = ()  # of recorded traffic: how late each request was sent
    took_s: float = 0.0

    @property
    def key(self) -> tuple[str, int, str]:
        return self.source, self.block, self.arm


class Journal:
    """Opened on a file that may be there already. Use it as a context."""

    def __init__(self, path: Path) -> None:
        self.done: list[Done] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except OSError:
            self._file.close()
            raise JournalError(f"{path}: another run is writing it") from None
        self._read()
        self._keys = {one.key for one in self.done}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __contains__(self, step: Step) -> bool:
        return step.key in self._keys

    @property
    def observations(self) -> Iterator[Observation]:
        return (seen for one in self.done for seen in one.observations)

    def add(self, one: Done) -> None:
        """Returns when it is on disk."""
        line = orjson.dumps(
            {
                "source": one.source,
                "block": one.block,
                "arm": one.arm,
                "took_s": one.took_s,
                "counters": dict(one.counters),
                "late_s": list(one.late_s),
                "observations": [seen.payload() for seen in one.observations],
            }
        )
        self._file.write(line + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.append(one)
        self._keys.add(one.key)

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break  # it was killed as it wrote this
            try:
                self.done.append(_done(orjson.loads(line)))
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                self._file.close()
                why = f"{self._path}:{number}  is no line of a journal: {error}"
                raise JournalError(f"{why}; remove the folder to run again") from None
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)


def _done(told: Mapping[str, Any]) -> Done:
    observations: Sequence[Mapping[str, Any]] = told["observations"]
    return Done(
        told["source"],
        told["block"],
        told["arm"],
        tuple(map(Observation.of, observations)),
        told["counters"],
        tuple(told["late_s"]),
        told["took_s"],
    )
