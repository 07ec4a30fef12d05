"""A verdict and what it was made of, as files: verdict.json, and pairs.jsonl.zst to recompute it.

The second holds everything that `judge` was given, a JSON line each: first the hypothesis and what
is known of the run, then the observations, sorted. The same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import zstandard
from pydantic import TypeAdapter

from evals.controls import Facts
from evals.gate import judge
from evals.pairs import ARMS
from evals.verdict import Side, Verdict
from policies.hypothesis import Hypothesis
from telemetry import Observation

VERDICT_FILE, PAIRS_FILE = "verdict.json", "pairs.jsonl.zst"
_SCHEMA = 1
_LEVEL = 9
_SAME = 1e-9
_BYTES_MAX = 4 * 2**30  # of the rows, unpacked
# What a verdict says that its rows do: everything but when and with what it was written.
_RECOMPUTED = (
    "hypothesis", "decision", "reason", "reasons", "findings", "controls", "baseline", "candidate",
    "spec", "made_at", "expires_at", "kind_of_change", "design", "stats", "versions",
    "pairs_sha256", "schema",
)  # fmt: skip


class BrokenRun(Exception):
    """A folder or file that is not what a run leaves behind; says which, and what is wrong."""


@dataclass(frozen=True, slots=True)
class Rows:
    """All that `judge` was given."""

    hypothesis: Hypothesis
    observations: tuple[Observation, ...]
    sides: tuple[Side, Side]
    spec: Side
    now: float
    facts: Facts

    def judged(self) -> Verdict:
        """The verdict of these rows. Raises what `judge` raises."""
        verdict = judge(
            self.hypothesis, self.observations, self.sides, self.spec, self.now, self.facts
        )
        return replace(verdict, pairs_sha256=hashlib.sha256(_content(self)).hexdigest())


def write_run(folder: Path, rows: Rows) -> Verdict:
    """Judges, and writes both files, the verdict last. Raises what `judge` raises."""
    verdict = rows.judged()
    folder.mkdir(parents=True, exist_ok=True)
    packed = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(_content(rows))
    _replace(folder / PAIRS_FILE, packed)
    _replace(folder / VERDICT_FILE, verdict_bytes(verdict))
    return verdict


def verdict_bytes(verdict: Verdict) -> bytes:
    """As verdict.json has it; docs/verdict.schema.json describes it."""
    text = json.dumps(verdict.payload(), sort_keys=True, indent=1, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"


def read_verdict(path: Path) -> Verdict:
    """Of a run's folder, or of the file itself. Raises BrokenRun."""
    file = path / VERDICT_FILE if path.is_dir() else path
    try:
        payload = json.loads(file.read_bytes())
        return Verdict.of(payload)
    except OSError as error:
        raise BrokenRun(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenRun(f"{file}: is no verdict: {error}") from None


def read_rows(path: Path) -> Rows:
    """Of a run's folder, or of the file itself. Raises BrokenRun."""
    file = path / PAIRS_FILE if path.is_dir() else path
    try:
        with (
            file.open("rb") as stream,
            zstandard.ZstdDecompressor().stream_reader(stream) as reader,
        ):
            content = reader.read(_BYTES_MAX)
        head, *lines = content.decode("utf-8", "surrogatepass").splitlines()
        return _rows(json.loads(head), [json.loads(line) for line in lines])
    except OSError as error:
        raise BrokenRun(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, zstandard.ZstdError) as error:
        raise BrokenRun(f"{file}: holds no rows of a run: {str(error)[:300]}") from None


def differences(told: Verdict, again: Verdict) -> list[str]:
    """Where a verdict does not say what its rows say; empty for a true one. Numbers may differ in
    what another processor's arithmetic does, bytes on the same one do not.
    """
    left, right = json.loads(verdict_bytes(told)), json.loads(verdict_bytes(again))
    wrong: list[str] = []
    for name in _RECOMPUTED:
        _compare(name, left.get(name), right.get(name), wrong)
    return wrong


def _compare(where: str, told: Any, again: Any, wrong: list[str]) -> None:
    if isinstance(told, dict) and isinstance(again, dict):
        for name in sorted({*told, *again}):
            _compare(f"{where}.{name}", told.get(name), again.get(name), wrong)
    elif isinstance(told, list) and isinstance(again, list) and len(told) == len(again):
        for index, (one, other) in enumerate(zip(told, again, strict=True)):
            _compare(f"{where}.{index}", one, other, wrong)
    elif isinstance(told, float) and isinstance(again, float):
        if not math.isclose(told, again, rel_tol=_SAME, abs_tol=_SAME):
            wrong.append(f"{where}: the verdict says {told!r}, its rows say {again!r}")
    elif told != again:
        wrong.append(f"{where}: the verdict says {told!r:.120}, its rows say {again!r:.120}")


def _content(rows: Rows) -> bytes:
    head = {
        "rows": _SCHEMA,
        "hypothesis": rows.hypothesis.model_dump(mode="json"),
        "sides": [asdict(one) for one in rows.sides],
        "spec": asdict(rows.spec),
        "now": rows.now,
        "facts": asdict(rows.facts),
    }
    lines = [_line(head)]
    lines += sorted_lines(rows.observations)
    return b"\n".join(lines) + b"\n"


def sorted_lines(observations: Iterable[Observation]) -> list[bytes]:
    """A JSON line each, by source, request, repeat and arm."""
    ranks: Mapping[str, int] = {arm: rank for rank, arm in enumerate(ARMS)}
    ordered = sorted(
        observations,
        key=lambda one: (one.source, one.id, one.repeat, ranks.get(one.arm, 9), one.arm),
    )
    return [_line(one.payload()) for one in ordered]


def _line(payload: Mapping[str, Any]) -> bytes:
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode("ascii")


def _rows(head: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Rows:
    if head["rows"] != _SCHEMA:
        raise ValueError(f"rows of schema {head['rows']!r}; this version reads {_SCHEMA}")
    left, right = (Side(**one) for one in head["sides"])
    return Rows(
        hypothesis=Hypothesis.model_validate_json(json.dumps(head["hypothesis"])),
        observations=tuple(Observation.of(one) for one in lines),
        sides=(left, right),
        spec=Side(**head["spec"]),
        now=head["now"],
        facts=Facts.of(head["facts"]),
    )


def _replace(file: Path, content: bytes) -> None:
    """Whole or not at all."""
    beside = file.with_name(f".{file.name}.new")
    beside.write_bytes(content)
    beside.replace(file)


def schema() -> dict[str, Any]:
    """The JSON Schema of verdict.json, which docs/verdict.schema.json publishes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TypeAdapter(Verdict).json_schema(mode="serialization"),
    }
