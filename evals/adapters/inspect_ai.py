"""Logs of inspect_ai, `.eval` and `.json`: samples by their id, epochs are repeats."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from evals.adapters.files import (
    EmptyRun,
    NoRun,
    Run,
    bytes_of,
    count,
    digest_of,
    object_in,
    share,
)
from telemetry import Observation

_ZSTD = 93  # of zip's compressions, which Python's zipfile does not know before 3.14
_NO_ENTRY = ("header.json", "_journal/start.json")


def read(path: Path, arm: str, cluster: str | None) -> Run:
    """One log, or all of a folder. `cluster`: a field of the samples' metadata. Raises NoRun."""
    named = [path] if path.is_file() else [one for one in _files(path) if _is_log(one)]
    files = {file: bytes_of(file) for file in named}
    if not files:
        raise NoRun(path, "is a folder without a log of inspect_ai, *.eval or *.json")
    names: dict[str, None] = {}
    versions: dict[str, str] = {}
    observations: list[Observation] = []
    for block, (file, data) in enumerate(files.items()):
        head, samples = log_of(file, data)
        said = head.get("eval")
        if not isinstance(said, dict) or "task" not in said:
            raise NoRun(file, "is no log of inspect_ai: it has no `eval.task`")
        names[str(said["task"])] = None
        versions |= {str(k): str(v) for k, v in (said.get("packages") or {}).items()}
        source = f"suite:{said['task']}"
        observations += [_observation(one, arm, source, block, cluster) for one in samples]
    if not observations:
        raise EmptyRun(path, "has no sample: the eval did not run, or was logged without samples")
    return Run("+".join(names), tuple(observations), digest_of(files), versions)


def _files(path: Path) -> list[Path]:
    """Of a folder, and below it. Raises NoRun."""
    if not path.exists():
        raise NoRun(path, "no such file or folder")
    return sorted(one for one in path.rglob("*.*") if one.is_file())


def _is_log(file: Path) -> bool:
    return file.suffix in (".eval", ".json") and file.name != "logs.json"


def log_of(file: Path, data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and samples. Raises NoRun."""
    if not data.startswith(b"PK"):
        whole = object_in(file, data)
        return whole, list(whole.get("samples") or [])
    members = dict(_members(file, data))
    head = next((members[name] for name in _NO_ENTRY if name in members), None)
    if head is None:
        raise NoRun(file, "is no log of inspect_ai: it has no header.json")
    samples = [
        object_in(file, members[name]) for name in sorted(members) if name.startswith("samples/")
    ]
    return object_in(file, head), samples


def _members(file: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(BytesIO(data)) as packed:
            for one in packed.infolist():
                if one.filename.startswith("samples/") or one.filename in _NO_ENTRY:
                    plain = one.compress_type != _ZSTD
                    yield one.filename, packed.read(one) if plain else _unzstd(data, one)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise NoRun(file, f"cannot be unpacked: {error}") from None


def _unzstd(data: bytes, member: zipfile.ZipInfo) -> bytes:
    """A member behind its local header (APPNOTE 4.3.7), whose two lengths say where it begins."""
    import zstandard

    name_bytes, extra_bytes = struct.unpack_from("<HH", data, member.header_offset + 26)
    begin = member.header_offset + 30 + name_bytes + extra_bytes
    packed = data[begin : begin + member.compress_size]
    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def _observation(
    sample: Mapping[str, Any], arm: str, source: str, block: int, cluster: str | None
) -> Observation:
    name = str(sample.get("id"))
    error = sample.get("error") or sample.get("limit")
    output = sample.get("output") or {}
    choice: Mapping[str, Any] = next(iter(output.get("choices") or []), {})
    message = choice.get("message") or {}
    usage = output.get("usage") or {}
    return Observation(
        id=name,
        source=source,
        arm=arm,
        cluster=str((sample.get("metadata") or {}).get(cluster or "", name)),
        block=block,
        repeat=int(sample.get("epoch", 1)) - 1,
        outcome="error" if error else "ok",
        status=0 if error else 200,
        problem=_problem(error),
        e2e_s=output.get("time"),
        prompt_tokens=_prompt_tokens(usage),
        cached_tokens=count(usage.get("input_tokens_cache_read")),
        completion_tokens=count(usage.get("output_tokens")),
        finish_reason=str(choice.get("stop_reason") or ""),
        text=_text(message.get("content")),
        scores=_scores(sample.get("scores") or {}),
    )


def _prompt_tokens(usage: Mapping[str, Any]) -> int | None:
    """inspect_ai counts cached tokens beside the others."""
    fresh = count(usage.get("input_tokens"))
    return None if fresh is None else fresh + (count(usage.get("input_tokens_cache_read")) or 0)


def _scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """Each scorer that gives a share, and each part of one that gives several; the first is
    `correct`."""
    found: dict[str, float] = {}
    for name, one in scores.items():
        value = one.get("value") if isinstance(one, dict) else one
        parts = value if isinstance(value, dict) else {"": value}
        for part, inner in parts.items():
            if (told := share(inner)) is not None:
                found[f"{name}_{part}" if part else name] = told
    first = next(iter(found), None)
    return found if first is None else {"correct": found[first], **found}


def _problem(error: Any) -> str:
    if not error:
        return ""
    if isinstance(error, dict):
        return str(error.get("message") or f"ran into the limit of {error.get('type')}")
    return str(error)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(one.get("text", "")) for one in content if isinstance(one, dict))
    return content if isinstance(content, str) else ""
