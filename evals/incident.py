"""Why a candidate was rolled back, as a folder: what was seen, the worst pairs, and a replay of it.

No text is in observations, so the replay has lengths and moments; where the gateway's recorder ran
and its files are on this machine, the same requests with their text are added.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from evals.pairs import BASELINE, CANDIDATE
from evals.steering import Candidate, Refused, Steered, Unreachable
from telemetry import Observation

WORST = 20
RECORDED_S = 3.0  # for the recorder's writer, which lets everybody else go first
LOOK_S = 0.5
READ_MAX_BYTES = 128 * 2**20  # of recorded files, the newest first
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


async def with_text(
    folder: Path, gateway: Steered, ids: Collection[str], pause: Callable[[float], Awaitable[None]]
) -> str:
    """Adds the same requests with their text, where the gateway records them on this machine;
    says what came of it."""
    until, found = time.monotonic() + RECORDED_S, 0
    try:
        files = await gateway.recorded()
        if files is None:
            return "without the text of requests: the gateway records none"
        if not files.is_dir():
            return f"without the text of requests: it is where the gateway runs, in {files}"
        while found < len(ids):
            found = await asyncio.to_thread(add_recorded, folder, files, ids)
            if time.monotonic() > until:
                break
            await pause(LOOK_S)
    except (OSError, Refused, Unreachable) as error:
        return f"without the text of requests: {error}"
    return f"with the text of {found} of {len(ids)} requests"


def add_recorded(folder: Path, files: Path, ids: Collection[str]) -> int:
    """Puts what the recorder has of these requests beside an incident, where only its owner may
    read it; how many it has of them. Raises OSError."""
    spans = sorted(_spans_of(files, ids), key=lambda one: str(one.get("start_time")))
    told = orjson.loads((folder / "incident.json").read_bytes())
    told["recorded"] = {"folder": str(files), "requests": len(spans), "of": len(ids)}
    if spans:
        file = folder / "recorded.jsonl"
        file.touch(mode=0o600)
        _write(file, _conversations(spans))
        told["replay"] = f"headgate replay {file} --url URL"
    (folder / "incident.json").write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    return len(spans)


def _spans_of(files: Path, ids: Collection[str]) -> Iterator[dict[str, Any]]:
    """Spans of finished files and of the one that is being written, whose last line may be half;
    one that a file has while it is put together is told once."""
    seen: set[str] = set()
    left = READ_MAX_BYTES
    for file in sorted(files.glob("*.jsonl*"), reverse=True):
        try:
            data = file.read_bytes()
        except FileNotFoundError:  # put together meanwhile, or let go of
            continue
        left -= len(data)
        for line in data.splitlines():
            with suppress(orjson.JSONDecodeError):
                for span in orjson.loads(line)["spans"]:
                    name = span["attributes"].get("headgate.request.id")
                    if name in ids and span["span_id"] not in seen:
                        seen.add(span["span_id"])
                        yield span
        if left < 0:
            return


def _conversations(spans: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the recorder's files have them; what failed is played again all the same."""
    found: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        found.setdefault(span["trace_id"], []).append({**span, "status": {"code": 0}})
    return [{"trace_id": name, "spans": those} for name, those in found.items()]


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
