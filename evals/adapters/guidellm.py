"""Reports of guidellm, `--output kind=json`: requests in the order in which they were sent.

Each report is a block; a sweep has a load of its own for each of its strategies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evals.adapters.files import (
    EmptyRun,
    NoRun,
    Run,
    bytes_of,
    count,
    digest_of,
    files_of,
    numbered,
    object_in,
)
from telemetry import Observation, Outcome

_OUTCOMES: Mapping[str, Outcome] = {
    "successful": "ok",
    "errored": "error",
    "incomplete": "cancelled",
}


def read(path: Path, arm: str, cluster: str | None) -> Run:
    """One report, or all of a folder, the earliest first. Raises NoRun."""
    files = {file: bytes_of(file) for file in files_of(path, "*.json")}
    versions: dict[str, str] = {}
    blocks: list[list[Observation]] = []
    for file, data in files.items():
        report = object_in(file, data)
        benchmarks = report.get("benchmarks")
        if not isinstance(benchmarks, list):
            raise NoRun(file, "is no report of guidellm: it has no `benchmarks`")
        if version := (report.get("metadata") or {}).get("guidellm_version"):
            versions["guidellm"] = str(version)
        several = len(benchmarks) > 1
        for one in benchmarks:
            name = f"guidellm-{_strategy(one)}" if several else "guidellm"
            blocks.append(list(_requests(file, one, arm, f"replay:{name}", cluster)))
    if not any(blocks):
        raise EmptyRun(path, "has no request; was it written with requests left out?")
    return Run("guidellm", numbered(blocks), digest_of(files), versions)


def _strategy(benchmark: Mapping[str, Any]) -> str:
    strategy = (benchmark.get("config") or {}).get("strategy") or {}
    rate = strategy.get("rate")
    return str(strategy.get("type_", "load")) + (f"@{rate:g}" if rate else "")


def _requests(
    file: Path, benchmark: Mapping[str, Any], arm: str, source: str, cluster: str | None
) -> Iterator[Observation]:
    requests = benchmark.get("requests")
    if not isinstance(requests, dict):
        raise NoRun(file, "is no report of guidellm: a benchmark has no `requests`")
    for status, outcome in _OUTCOMES.items():
        for given in requests.get(status) or ():
            yield _observation(given, arm, source, outcome, cluster)


def _observation(
    given: Mapping[str, Any], arm: str, source: str, outcome: Outcome, cluster: str | None
) -> Observation:
    info = given.get("info") or {}
    moments = info.get("timings") or {}
    begin, first, last = (
        moments.get(name)
        for name in ("request_start", "first_token_iteration", "last_token_iteration")
    )
    end = moments.get("request_end")
    said, asked = given.get("output_metrics") or {}, given.get("input_metrics") or {}
    tokens = count(said.get("text_tokens"))
    several = tokens is not None and tokens > 1
    return Observation(
        id="",
        source=source,
        arm=arm,
        cluster=str(info.get("conversation_id") or "") if cluster else "",
        turn=int(info.get("turn_index") or 0),
        at_s=float(begin or moments.get("queued") or 0.0),
        outcome=outcome,
        status=200 if outcome == "ok" else 0,
        problem="" if outcome == "ok" else str(info.get("error") or outcome),
        ttft_s=first - begin if first and begin else None,
        tpot_s=(last - first) / (tokens - 1) if several and first and last and tokens else None,
        e2e_s=end - begin if end and begin else None,
        prompt_tokens=count(asked.get("text_tokens")),
        cached_tokens=count(asked.get("cached_tokens")),
        completion_tokens=tokens,
        text=str(given.get("output") or ""),
    )
