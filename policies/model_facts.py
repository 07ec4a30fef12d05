"""What a model folder and our own source are, by their content: the facts behind a fingerprint.

Knows files and versions; knows no device, no policy and no torch, so that whoever decides what may
run can do so before anything is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cache.tokenizer_files import read_json, template_sources
from policies.side import canonical, digest

log = logging.getLogger(__name__)

# Hashing larger files again at each start would be felt: their digests are kept between starts.
KEPT_FROM_BYTES = 64 * 2**20
KEPT_FILES_MAX = 4096

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ("runtime", "cache", "spec_decode")
_SOURCE_SUFFIXES = {".py", ".cpp", ".h"}

Facts = Mapping[str, Any]


def read_weights(folder: Path, kept: Path | None = None) -> Facts:
    """Digests of config.json and of the safetensors that belong to the model.

    Reads all of them, except large ones whose digest stands in the file `kept` (default: in the
    user's cache folder) under the same size and times.
    """
    index = read_json(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict) and index:
        names = sorted(set(map(str, index.values())))
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    digests = digest_files((folder / name for name in names), kept or kept_digests())
    return {
        "config.json": digest(canonical(read_json(folder / "config.json"))),
        "files": dict(zip(names, digests, strict=True)),
    }


def tokenizer_facts(folder: Path) -> Facts:
    """Digests of what turns text into ids and ends an answer; chat templates are a leaf apart."""
    config = read_json(folder / "tokenizer_config.json")
    config.pop("chat_template", None)
    ends = {
        name: read_json(folder / name).get("eos_token_id")
        for name in ("config.json", "generation_config.json")
    }
    return {
        "tokenizer.json": digest((folder / "tokenizer.json").read_bytes()),
        "tokenizer_config.json": digest(canonical(config)),
        "special_tokens_map.json": digest(canonical(read_json(folder / "special_tokens_map.json"))),
        "eos_token_id": ends,
    }


def template_facts(folder: Path) -> Facts:
    """Digests of the chat templates by name; empty for a model without any."""
    sources = template_sources(folder, read_json(folder / "tokenizer_config.json"))
    return {name: digest(source.encode()) for name, source in sources.items()}


def engine_facts() -> Facts:
    """Our version and source text, and the versions of what computes and tokenizes."""
    return {
        "headgate": version("headgate"),
        "source": source_digest(ENGINE),
        **{name: version(name) for name in ("tokenizers", "torch", "transformers")},
    }


def source_digest(packages: Iterable[str], root: Path = ROOT) -> str:
    """One digest over the text of our source files, whatever the order of a folder's listing."""
    whole = hashlib.sha256()
    for package in packages:
        for file in sorted((root / package).rglob("*")):
            if file.suffix not in _SOURCE_SUFFIXES:
                continue
            body = file.read_bytes()
            name = file.relative_to(root).as_posix()
            whole.update(f"{name}\0{len(body)}\0".encode() + body)
    return whole.hexdigest()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return None


# ---- digests of large files ---------------------------------------------------------------------


def kept_digests() -> Path:
    """Where digests are kept between starts."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "headgate" / "digests.json"


def digest_files(
    files: Iterable[Path], kept: Path, *, kept_from_bytes: int = KEPT_FROM_BYTES
) -> list[str]:
    """SHA-256 of each file's content. A digest is kept under size, and times of both kinds."""
    known = _read_kept(kept)
    digests, news = [], {}
    for file in files:
        status = file.stat()
        if status.st_size < kept_from_bytes:
            digests.append(_digest_file(file))
            continue
        name = str(file.resolve())
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        before = known.get(name)
        if not (isinstance(before, list) and len(before) == 4 and before[:3] == stamp):
            before = news[name] = [*stamp, _digest_file(file)]
        digests.append(str(before[3]))
    if news:
        _write_kept(kept, known | news)
    return digests


def _digest_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_kept(kept: Path) -> dict[str, Any]:
    try:
        data = json.loads(kept.read_bytes())
    except (OSError, ValueError, RecursionError):  # there is none yet, or it was cut: hash again
        return {}
    return data if isinstance(data, dict) else {}


def _write_kept(kept: Path, digests: dict[str, Any]) -> None:
    newest = dict(list(digests.items())[-KEPT_FILES_MAX:])
    half = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(newest))
        half.replace(kept)
    except OSError as error:  # a read-only home: the next start hashes again, nothing else is lost
        log.info("digests of weight files are not kept: %s", error)


# ---- hub names ----------------------------------------------------------------------------------
