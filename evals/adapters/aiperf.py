"""Records of aiperf, `profile_export.jsonl`: requests in the order in which they were sent.

Each run is a block; the requests of its warm-up are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from evals.adapters.files import (
    EmptyRun,
    NoRun,
    Run,
    bytes_of,
    count,
    digest_of,
    files_of,
    lines_in,
    numbered,
)
from telemetry import Observation, Outcome

_SUMMARY = "profile_export_aiperf.json"


def read(path: Path, arm: str, cluster: str | None) -> Run:
    """One file of records, or all of a folder, the earliest first. Raises NoRun."""
    files = {file: bytes_of(file) for file in files_of(path, "profile_export*.jsonl")}
    blocks = [list(_requests(file, data, arm, cluster)) for file, data in files.items()]
    if not any(blocks):
        raise EmptyRun(path, "has no request; was it written with --export-level summary?")
    versions = dict(filter(None, (_version(file.with_name(_SUMMARY)) for file in files)))
    return Run("aiperf", numbered(blocks), digest_of(files), versions)


def _version(summary: Path) -> tuple[str, str] | None:
    try:
        return "aiperf", str(orjson.loads(summary.read_bytes())["aiperf_version"])
    except (OSError, KeyError, TypeError, orjson.JSONDecodeError):
        return None  # the records say all that is compared


def _requests(file: Path, data: bytes, arm: str, cluster: str | None) -> Iterator[Observation]:
    for line, given in lines_in(file, data):
        about, metrics = given.get("metadata"), given.get("metrics")
        if not isinstance(about, dict) or "request_start_ns" not in about:
            raise NoRun(file, "is no record of aiperf: it has no metadata.request_start_ns", line)
        if about.get("benchmark_phase", "profiling") == "profiling":
            yield _observation(about, metrics or {}, given.get("error"), arm, cluster)


def _observation(
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    error: Any,
    arm: str,
    cluster: str | None,
) -> Observation:
    def value(*names: str) -> Any:
        return next((metrics[name]["value"] for name in names if name in metrics), None)

    def seconds(name: str) -> float | None:
        found = value(name)
        return None if found is None else float(found) / 1000

    outcome: Outcome = "error" if error else "cancelled" if about.get("was_cancelled") else "ok"
    gaps = value("inter_chunk_latency")
    return Observation(
        id="",
        source="replay:aiperf",
        arm=arm,
        cluster=str(about.get("conversation_id") or "") if cluster else "",
        turn=int(about.get("turn_index") or 0),
        at_s=about["request_start_ns"] / 1e9,
        outcome=outcome,
        status=200 if outcome == "ok" else int((error or {}).get("code") or 0),
        problem="" if outcome == "ok" else str((error or {}).get("message") or outcome),
        ttft_s=seconds("time_to_first_token"),
        tpot_s=seconds("inter_token_latency"),
        gap_max_s=max(gaps) / 1000 if isinstance(gaps, list) and gaps else None,
        e2e_s=seconds("request_latency"),
        prompt_tokens=count(value("usage_prompt_tokens", "input_sequence_length")),
        completion_tokens=count(value("usage_completion_tokens", "output_sequence_length")),
    )
