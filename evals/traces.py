"""Recorded traffic as rows: when a request came, and its body or how long it was.

Knows the files that people have (FORMATS); knows no server. What a file has of lengths only becomes
text in `filler.py`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from evals.filler import Filler
from evals.item import Item
from evals.rows import FORMATS, Lines, Row, TraceError, object_of
from policies.problems import closest

FILE_BYTES_MAX = 2 * 2**30
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Trace:
    """A file, read. `digest` is of its bytes: what a verdict over this traffic is bound to."""

    name: str
    format: str
    digest: str
    rows: tuple[Row, ...]

    @property
    def spans_s(self) -> float:
        """From the first request to the last."""
        return self.rows[-1].t_s if self.rows else 0.0

    @property
    def needs_filler(self) -> bool:
        return any(row.body is None for row in self.rows)

    def window(
        self, begin_s: float = 0.0, end_s: float | None = None, most: int | None = None
    ) -> Trace:
        """The rows that came within [begin_s, end_s), at most so many, from 0 s on again."""
        kept = [r for r in self.rows if begin_s <= r.t_s and (end_s is None or r.t_s < end_s)]
        return replace(self, rows=tuple(replace(r, t_s=r.t_s - begin_s) for r in kept[:most]))

    def items(self, filler: Filler, model: str | None = None) -> Iterator[Item]:
        """The requests in their order, each made when it is asked for: made-up text is large.

        `model` replaces that of every row; a row without one needs it.
        """
        for row in self.rows:
            body = dict(row.body) if row.body is not None else filler.body(row)
            if model is not None or "model" not in body:
                body["model"] = model
            meta = {"t_s": row.t_s, **row.meta}
            yield Item(row.id, row.cluster or row.id, row.turn, body, row.expected, row.tier, meta)


def read_trace(path: Path, kind: str | None = None) -> Trace:
    """A file in one of FORMATS, plain, .gz or .zst; which one, its first line tells. Of a folder,
    all its .jsonl files, as the gateway's recorder leaves them.

    Raises TraceError for what is none, and for a row that makes no sense.
    """
    name = path.resolve().name.partition(".")[0] or "recorded"
    rows: list[Row] = []
    digests = []
    for file in _files(path):
        data, digest = _read(file)
        digests.append(digest)
        lines = _lines(file, data)
        kind = kind or _format_of(file, lines)
        rows += FORMATS[kind](str(file), lines)
    if not rows or kind is None:
        raise TraceError(str(path), None, "has no request in it")
    rows.sort(key=lambda row: row.t_s)
    begin = rows[0].t_s
    rows = [
        replace(row, t_s=row.t_s - begin, id=row.id or f"{name}-{number:06d}")
        for number, row in enumerate(rows)
    ]
    _refuse_twice(str(path), rows)
    whole = (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )
    return Trace(name, kind, whole, tuple(rows))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(one for one in path.iterdir() if ".jsonl" in one.suffixes)
    if not files:
        raise TraceError(str(path), None, "is a folder without a .jsonl file")
    return files


def _read(path: Path) -> tuple[bytes, str]:
    """The file's bytes, unpacked, and the digest of those that lie on the disk."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise TraceError(str(path), None, f"is larger than {FILE_BYTES_MAX} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(str(path), None, f"cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        elif data.startswith(ZSTD_MAGIC):
            data = _unzstd(data)
    except (OSError, EOFError) as error:
        raise TraceError(str(path), None, f"cannot be unpacked: {error}") from None
    return data, digest


def _unzstd(data: bytes) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as reader:
            return reader.read()
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None


def _lines(path: Path, data: bytes) -> Lines:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TraceError(str(path), line, "is not UTF-8") from None
    return [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _refuse_twice(file: str, rows: list[Row]) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise TraceError(file, None, f"has the id {row.id!r} twice; ids make pairs of arms")
        seen.add(row.id)


# ---- which format it is -------------------------------------------------------------------------


def _format_of(path: Path, lines: Lines) -> str:
    if not lines:
        raise TraceError(str(path), None, "is empty")
    number, first = lines[0]
    if first.lstrip().startswith("{"):
        names = set(object_of(str(path), number, first))
        for format_, needed in _JSON.items():
            if needed & names:
                return format_
        wanted = {name for needed in _JSON.values() for name in needed}
    else:
        names = {one.strip().lower() for one in next(csv.reader([first]))}
        for format_, needed in _COLUMNS.items():
            if needed <= names:
                return format_
        wanted = {name for needed in _COLUMNS.values() for name in needed}
    near = next(filter(None, (closest(name, sorted(wanted)) for name in sorted(names))), None)
    hint = f"; did you mean {near!r}?" if near else ""
    raise TraceError(
        str(path), number,
        f"is in none of the formats {', '.join(FORMATS)}: it has {_listed(names)}{hint}",
    )  # fmt: skip


def _listed(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)[:8]) or "nothing"


_JSON = {
    "mooncake": {"input_length"},
    "headgate": {"body"},
    "otel": {"spans", "span_id", "spanId", "resourceSpans"},
}
_COLUMNS = {
    "azure": {"timestamp", "contexttokens", "generatedtokens"},
    "burstgpt": {"timestamp", "request tokens", "response tokens"},
    "servegen": {"t_s", "input_tokens", "output_tokens"},
}


# ---- the formats --------------------------------------------------------
