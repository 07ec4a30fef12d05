"""What was decided, append-only: `decisions.jsonl`, a line a decision, and the verdicts behind it.

Evals and rollouts write, gateway and runtime read. A line is whole or it is none: a writer that
dies, a full disk or a second writer costs no decision that was ever acknowledged. Knows no policy.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from policies.side import canonical, digest

LINES = "decisions.jsonl"
VERDICTS = "verdicts"
ON_DRIFT = "on_traffic_drift"  # in the detail of a drift: what its hypothesis makes of it
_ID_DIGITS = 16
CONCLUSIVE = ("pass", "fail", "no_benefit")  # the others say nothing of the candidate


class LedgerError(Exception):
    """A decision that could not be written, or read back: where, and why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One line. `baseline`, `candidate` and `spec` are roots; `at` is in seconds since 1970.

    `quarantine` keeps a candidate from going live until a verdict that is made later passes;
    `rollout` is a step on the way, with its share in `detail`; `drift` says that live traffic has
    `moved` from what was judged, or is the `same`.
    """

    kind: Literal["verdict", "quarantine", "rollout", "drift"]
    hypothesis: str
    baseline: str
    candidate: str
    spec: str
    at: float
    decision: str = ""  # of a verdict: pass, fail, ...; of a rollout: its stage
    reason: str = ""
    expires_at: float | None = None  # None: never
    evidence: str = ""  # the verdict's file, by its content
    detail: Mapping[str, Any] = field(default_factory=dict)

    def covers(self, verdict: Decision) -> bool:
        """Whether this quarantine speaks of what the verdict found."""
        return self.kind == "quarantine" and (
            self.candidate == verdict.candidate or bool(self.evidence == verdict.evidence != "")
        )

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


@dataclass(frozen=True, slots=True)
class Reading:
    """The ledger as it was at one moment, the earliest first; `damaged` are lines that are none."""

    decisions: tuple[Decision, ...] = ()
    damaged: tuple[int, ...] = ()

    def verdicts(self) -> tuple[Decision, ...]:
        return tuple(one for one in self.decisions if one.kind == "verdict")

    def quarantine_of(self, verdict: Decision, candidate: str = "") -> Decision | None:
        """The last quarantine of the verdict's candidate, or of the root that it would be now, if
        the verdict is no newer evidence."""
        later = [
            one
            for one in self.decisions
            if one.kind == "quarantine"
            and one.at >= verdict.at
            and (one.covers(verdict) or (candidate != "" and one.candidate == candidate))
        ]
        return later[-1] if later else None

    def drift_since(self, verdict: Decision) -> Decision | None:
        """That live traffic has moved since a verdict, if that was the last word on it."""
        said = [
            one
            for one in self.decisions
            if one.kind == "drift" and one.hypothesis == verdict.hypothesis and one.at >= verdict.at
        ]
        return said[-1] if said and said[-1].decision == "moved" else None

    def live(self, baseline: str, candidate: str, spec: str, now: float) -> Decision | None:
        """The pass for exactly these three roots, unless it has expired, a later verdict says
        otherwise, the candidate was quarantined since, or live traffic has moved away from what
        was judged, and its hypothesis does not want to be told of that only."""
        roots = (baseline, candidate, spec)
        found = [
            one
            for one in self.verdicts()
            if (one.baseline, one.candidate, one.spec) == roots and one.decision in CONCLUSIVE
        ]
        last = max(found, key=lambda one: one.at, default=None)
        if last is None or last.decision != "pass" or last.expired(now):
            return None
        drift = self.drift_since(last)
        moved = drift is not None and drift.detail.get(ON_DRIFT, "stale") == "stale"
        return None if moved or self.quarantine_of(last) else last


@dataclass(frozen=True, slots=True)
class Ledger:
    """A folder. It need not exist before something is written."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Ledger:
        return cls(Path(folder).absolute())

    @property
    def lines(self) -> Path:
        return self.folder / LINES

    # ---- reading --------------------------------------------------------------------------------

    def read(self) -> Reading:
        """All of it. A last line without its end was never acknowledged, and is passed over; any
        other line that is no decision is told. Raises LedgerError where the file cannot be read."""
        try:
            body = self.lines.read_bytes()
        except FileNotFoundError:
            return Reading()
        except OSError as error:
            raise LedgerError(f"{self.lines} cannot be read: {error.strerror}") from None
        *lines, _torn = body.split(b"\n")
        decisions, damaged = [], []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            one = _decision(line)
            if one is None:
                damaged.append(number)
            else:
                decisions.append(one)
        return Reading(tuple(decisions), tuple(damaged))

    def verdicts(self) -> tuple[Decision, ...]:
        """Decisions of gates, the earliest first."""
        return self.read().verdicts()

    def verdict(self, evidence: str) -> dict[str, Any]:
        """The payload behind a decision. Raises LedgerError where it is gone or no longer what was
        recorded. In a copy it may lie beside the lines: a ConfigMap has no folders."""
        file = self.folder / VERDICTS / f"{evidence}.json"
        flat = self.folder / file.name
        try:
            body = (flat if not file.exists() and flat.exists() else file).read_bytes()
        except OSError as error:
            raise LedgerError(f"{file} cannot be read: {error.strerror}") from None
        payload = None
        if digest(body)[:_ID_DIGITS] == evidence:
            with contextlib.suppress(ValueError):
                payload = json.loads(body)
        if not isinstance(payload, dict):
            raise LedgerError(f"{file} is not what was recorded: its content has another hash")
        return payload

    # ---- writing --------------------------------------------------------------------------------

    def record_verdict(self, payload: Mapping[str, Any]) -> Decision:
        """Keeps a verdict (`Verdict.payload()`), then the decision that it is. Raises LedgerError,
        and then nothing was recorded."""
        body = canonical(payload)
        evidence = digest(body)[:_ID_DIGITS]
        decision = Decision(
            "verdict",
            payload["hypothesis"],
            payload["baseline"]["root"],
            payload["candidate"]["root"],
            payload["spec"]["root"],
            payload["made_at"],
            payload["decision"],
            payload.get("reason", ""),
            payload.get("expires_at"),
            evidence,
        )
        try:
            _write_whole(self.folder / VERDICTS / f"{evidence}.json", body)
        except OSError as error:
            raise LedgerError(f"{self.folder}: no verdict can be kept: {error}") from None
        self.record(decision)
        return decision

    def quarantine(
        self,
        hypothesis: str,
        candidate: str,
        reason: str,
        *,
        baseline: str = "",
        spec: str = "",
        evidence: str = "",
        at: float | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> Decision:
        """From now on no verdict made until now enables this candidate. `evidence` names the
        verdict that had enabled it. Raises LedgerError."""
        decision = Decision(
            "quarantine", hypothesis, baseline, candidate, spec, time.time() if at is None else at,
            reason=reason, evidence=evidence, detail=detail or {},
        )  # fmt: skip
        self.record(decision)
        return decision

    def record(self, decision: Decision) -> None:
        """Appends one line, on the disk when this returns. Raises LedgerError, and then the ledger
        is what it was before."""
        line = canonical(asdict(decision)) + b"\n"
        try:
            _make(self.folder)
            with _locked(self.lines) as file:
                _append(file, line)
        except OSError as error:
            raise LedgerError(f"{self.lines} cannot be written: {error}") from None


def _decision(line: bytes) -> Decision | None:
    try:
        data = json.loads(line)
        one = Decision(**data)
        whole = all(isinstance(text, str) for text in (one.hypothesis, one.candidate, one.spec))
        timely = isinstance(one.at, int | float) and isinstance(one.expires_at, int | float | None)
    except (ValueError, TypeError, RecursionError):
        return None
    return one if whole and timely else None


def _make(folder: Path) -> None:
    """The folder, and that it is there after a power cut, too."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[int]:
    """The open file, of which this process is the only writer until the end."""
    new = not file.exists()
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)  # ends with the descriptor, and with the process
        if new:
            _sync_folder(file.parent)
        yield opened
    finally:
        os.close(opened)


def _append(file: int, line: bytes) -> None:
    """At the end, behind an end of line where the last writer died before its own."""
    size = os.lseek(file, 0, os.SEEK_END)
    if size and os.pread(file, 1, size - 1) != b"\n":
        line = b"\n" + line
    try:
        rest = line
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


def _write_whole(file: Path, body: bytes) -> None:
    """Under its name only when it is whole and on the disk."""
    _make(file.parent)
    opened, half = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(opened, "wb") as stream:
            stream.write(body)
            stream.flush()
            os.fsync(stream.fileno())
        Path(half).chmod(0o644)
        Path(half).replace(file)
    except BaseException:
        Path(half).unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)
