"""Results of promptfoo, `-o results.json`, `.jsonl`: tests by what they ask, a repeat each time.

promptfoo numbers tests by their place; pairs are made by their variables, so that a test that was
put in between moves none. The score is that of all assertions together, and each named one.
"""

from __future__ import annotations

import hashlib
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
    object_in,
    share,
)
from telemetry import Observation

_ERROR = 2  # promptfoo's failureReason: 0 none, 1 an assertion, 2 an error


def read(path: Path, arm: str, cluster: str | None) -> Run:
    """One file of results, or all of a folder. `cluster`: a variable of the tests. Raises NoRun."""
    files = {file: bytes_of(file) for file in files_of(path, "*.json*")}
    versions: dict[str, str] = {}
    seen: list[Observation] = []
    repeats: dict[str, int] = {}
    providers: dict[str, None] = {}
    for block, (file, data) in enumerate(files.items()):
        for given in _results(file, data, versions):
            provider = given.get("provider") or {}
            providers[str(provider.get("label") or provider.get("id"))] = None
            name = _id(given)
            repeats[name] = repeats.get(name, -1) + 1
            seen.append(_observation(given, arm, name, block, repeats[name], cluster))
    if len(providers) > 1:
        asked = ", ".join(providers)
        raise NoRun(path, f"asks several providers ({asked}); run one each: --filter-providers")
    if not seen:
        raise EmptyRun(path, "has no result")
    return Run("promptfoo", tuple(seen), digest_of(files), versions)


def _results(file: Path, data: bytes, versions: dict[str, str]) -> Iterator[dict[str, Any]]:
    if file.suffix == ".jsonl":
        for line, given in lines_in(file, data):
            if "testCase" not in given:
                raise NoRun(file, "is no result of promptfoo: it has no testCase", line)
            yield given
        return
    whole = object_in(file, data)
    results = whole.get("results")
    if not isinstance(results, dict) or not isinstance(results.get("results"), list):
        raise NoRun(file, "is no file of promptfoo: it has no `results.results`")
    if version := (whole.get("metadata") or {}).get("promptfooVersion"):
        versions["promptfoo"] = str(version)
    yield from results["results"]


def _id(given: Mapping[str, Any]) -> str:
    asked = [given.get("promptIdx"), given.get("vars")]
    short = hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]
    return f"{(given.get('testCase') or {}).get('description') or 'test'} {short}"


def _observation(
    given: Mapping[str, Any], arm: str, name: str, block: int, repeat: int, cluster: str | None
) -> Observation:
    response = given.get("response") or {}
    usage = response.get("tokenUsage") or {}
    broken = given.get("failureReason") == _ERROR
    output = response.get("output")
    latency_ms = given.get("latencyMs")
    return Observation(
        id=name,
        source="suite:promptfoo",
        arm=arm,
        cluster=str((given.get("vars") or {}).get(cluster or "", name)),
        block=block,
        repeat=repeat,
        outcome="error" if broken else "ok",
        status=0 if broken else 200,
        problem=str(given.get("error") or "failed") if broken else "",
        # What promptfoo took from its own cache, no server answered.
        e2e_s=None if response.get("cached") or not latency_ms else float(latency_ms) / 1000,
        prompt_tokens=count(usage.get("prompt")),
        completion_tokens=count(usage.get("completion")),
        finish_reason=str(response.get("finishReason") or ""),
        text=output if isinstance(output, str) else "" if output is None else _json(output),
        scores={} if broken else _scores(given),
    )


def _json(output: Any) -> str:
    return orjson.dumps(output).decode()


def _scores(given: Mapping[str, Any]) -> dict[str, float]:
    """`correct`: whether the test passed, which is what promptfoo counts."""
    found = {"correct": float(bool(given.get("success")))}
    named = {"score": given.get("score"), **(given.get("namedScores") or {})}
    told = {name: share(value) for name, value in named.items()}
    return found | {name: value for name, value in told.items() if value is not None}
