"""Samples of lm-evaluation-harness, `samples_TASK_DATE.jsonl` of `--log_samples`.

It writes no requests that failed: a run in which some did ends without samples, and rows that one
run lacks count as failed there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.adapters.files import (
    EmptyRun,
    NoRun,
    Run,
    bytes_of,
    digest_of,
    files_of,
    lines_in,
    share,
)
from telemetry import Observation

_NAME = re.compile(r"samples_(.+?)_\d{4}-\d{2}-\d{2}T")


def read(path: Path, arm: str, cluster: str | None) -> Run:
    """One file of samples, or all of a folder; `cluster` is a field of its documents.

    Raises NoRun.
    """
    files = {file: bytes_of(file) for file in files_of(path, "samples_*.jsonl")}
    names: dict[str, None] = {}
    seen: list[Observation] = []
    repeats: dict[tuple[str, str], int] = {}
    filters: dict[str, Any] = {}  # of a task that scores each answer by several, the first counts
    for block, (file, data) in enumerate(files.items()):
        match = _NAME.match(file.name)
        name = match[1] if match else file.stem
        names[name] = None
        for line, given in lines_in(file, data):
            if "doc_id" not in given or "metrics" not in given:
                raise NoRun(file, "is no sample of lm-eval: it has no doc_id and metrics", line)
            filtered = given.get("filter")
            if filters.setdefault(name, filtered) != filtered:
                continue
            key = (name, str(given["doc_id"]))
            repeats[key] = repeats.get(key, -1) + 1
            seen.append(_observation(given, arm, name, block, repeats[key], cluster))
    if not seen:
        raise EmptyRun(path, "has no sample")
    return Run("+".join(names), tuple(seen), digest_of(files), {})


def _observation(
    given: Mapping[str, Any],
    arm: str,
    name: str,
    block: int,
    repeat: int,
    cluster: str | None,
) -> Observation:
    document = given.get("doc") if isinstance(given.get("doc"), dict) else {}
    assert isinstance(document, dict)
    key = str(given["doc_id"])
    return Observation(
        id=key,
        source=f"suite:{name}",
        arm=arm,
        cluster=str(document.get(cluster or "", key)),
        block=block,
        repeat=repeat,
        text=_text(given.get("filtered_resps") or given.get("resps")),
        scores=_scores(given),
    )


def _scores(given: Mapping[str, Any]) -> dict[str, float]:
    names = [str(one) for one in given["metrics"]]
    found = {name: told for name in names if (told := share(given.get(name))) is not None}
    first = next(iter(found), None)
    return found if first is None else {"correct": found[first], **found}


def _text(answers: Any) -> str:
    while isinstance(answers, list) and answers:
        answers = answers[0]
    return answers if isinstance(answers, str) else ""
