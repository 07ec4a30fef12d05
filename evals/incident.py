"""Why a candidate was rolled back, as a folder: what was seen, the worst pairs, and a replay of it.

No text is in observations, so the replay has lengths and moments; where the gateway's recorder ran,
its files have the text of the same requests, by their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from evals.pairs import BASELINE, CANDIDATE
from evals.steering import Candidate
from telemetry import Observation

WORST = 20
BLOCK_TOKENS = 512  # of a trace's hash ids, as Mooncake has them


@dataclass(frozen=True, slots=True)
class Incident:
    """One rollback."""

    candidate: Candidate
    why: str
    stage: str
    at: float

    def write(
        self, incidents: Path, latest: Sequence[Observation], signals: Sequence[Mapping[str, Any]]
    ) -> Path:
        """The folder that it made."""
        stamp = datetime.fromtimestamp(self.at, UTC).strftime("%Y%m%dT%H%M%S")
        folder = incidents / f"{self.candidate.name}-{stamp}"
        folder.mkdir(parents=True, exist_ok=True)
        told = {
            **asdict(self),
            "signals": list(signals),
            "worst": [_pair(*one) for one in worst(latest)],
            "replay": f"headgate replay {folder / 'replay.jsonl'} --url URL",
        }
        options = orjson.OPT_INDENT_2
        (folder / "incident.json").write_bytes(orjson.dumps(told, option=options))
        _write(folder / "observations.jsonl", (one.payload() for one in latest))
        _write(folder / "replay.jsonl", trace(latest))
        return folder


def worst(latest: Sequence[Observation]) -> list[tuple[Observation | None, Observation]]:
    """The candidate's worst requests, failed and bad ones first, then the slowest; each with the
    baseline's answer to the same, where there is one."""
    baseline = {one.id: one for one in latest if one.arm == BASELINE}
    own = [one for one in latest if one.arm == CANDIDATE]
    own.sort(key=lambda one: (one.ok, -one.scores.get("bad_output", 0.0), -(one.e2e_s or 0.0)))
    return [(baseline.get(one.id), one) for one in own[:WORST]]


def _pair(before: Observation | None, after: Observation) -> dict[str, Any]:
    return {"baseline": None if before is None else before.payload(), "candidate": after.payload()}


def trace(latest: Sequence[Observation]) -> list[dict[str, Any]]:
    """The requests as a trace in Mooncake's form: moments in ms, lengths, and whose turn it is."""
    once = {one.id: one for one in latest}.values()
    rows = sorted(once, key=lambda one: one.at_s)
    first = rows[0].at_s if rows else 0.0
    return [
        {
            "timestamp": round(1000 * (one.at_s - first)),
            "input_length": one.prompt_tokens or 1,
            "output_length": one.completion_tokens or one.max_tokens or 1,
            "hash_ids": _blocks(one),
        }
        for one in rows
    ]


def _blocks(one: Observation) -> list[int]:
    """Prompts of a conversation share their beginning; how much more is not known."""
    count = max(1, -(-(one.prompt_tokens or 1) // BLOCK_TOKENS))
    base = int.from_bytes(one.cluster.encode()[:6], "big") << 16
    return [base + at for at in range(count)]


def _write(file: Path, rows: Any) -> None:
    file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
