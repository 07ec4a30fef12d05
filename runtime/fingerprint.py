"""What a worker serves, as one number: a hash over everything that can change its answers.

Seven leaves (weights, draft, tokenizer, template, engine, device, configuration), each the hash of
its facts as canonical JSON; the root is a hash over the leaves. Knows files, versions and the
policy; knows no requests. docs/fingerprint.md tells how to recompute it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from cache.tokenizer_files import read_json, template_sources
from policies.schema import Runtime

log = logging.getLogger(__name__)

LEAVES = ("weights", "draft", "tokenizer", "template", "engine", "device", "configuration")
SHORT_DIGITS = 12
# Hashing larger files again at each start would be felt: their digests are kept between starts.
KEPT_FROM_BYTES = 64 * 2**20
KEPT_FILES_MAX = 4096

_ROOT = Path(__file__).resolve().parents[1]
_SOURCES = ("runtime", "cache", "spec_decode")
_SOURCE_SUFFIXES = {".py", ".cpp", ".h"}
# Where the weights lie says nothing about them, their leaf says what they are; and who listens to
# block events changes no answer.
_PLACES = {"model", "revision", "kv_events"}

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`leaves` has a digest for each of LEAVES, None where there is nothing: no draft model."""

    root: str
    leaves: Mapping[str, str | None]
    facts: Mapping[str, Facts | None]

    @property
    def short(self) -> str:
        """The `system_fingerprint` of every answer."""
        return f"fp_{self.root[:SHORT_DIGITS]}"

    def payload(self) -> dict[str, Any]:
        """The body of GET /v1/fingerprint."""
        return {
            "object": "fingerprint",
            "system_fingerprint": self.short,
            "root": self.root,
            "leaves": dict(self.leaves),
            "facts": dict(self.facts),
        }


def combine(facts: Mapping[str, Facts | None]) -> Fingerprint:
    """The hash tree over the facts of all LEAVES. No leaf can pass for another, or for the root."""
    leaves: dict[str, str | None] = {}
    root = hashlib.sha256(b"headgate fingerprint root 1\0")
    for name in LEAVES:
        known = facts[name]
        leaves[name] = leaf = None if known is None else _leaf(name, known)
        root.update(name.encode() + (b"\0" if leaf is None else b"\1" + bytes.fromhex(leaf)))
    return Fingerprint(root.hexdigest(), leaves, {name: facts[name] for name in LEAVES})


def _leaf(name: str, facts: Facts) -> str:
    head = f"headgate fingerprint leaf 1\0{name}\0".encode()
    return hashlib.sha256(head + canonical(facts)).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON in one spelling: keys sorted, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def take(
    folder: Path,
    weights: Facts,
    runtime: Runtime,
    device: torch.device,
    *,
    adapters: Mapping[str, str] = MappingProxyType({}),
    draft: Facts | None = None,
) -> Fingerprint:
    """The fingerprint of a model folder as this policy serves it here; `weights` and `draft`, where
    there is one, are of `read_weights`.

    Raises TokenizerUnusable for files that do not parse.
    """
    configuration = {
        name: value
        for name, value in runtime.model_dump(mode="json").items()
        if name not in _PLACES
    }
    if runtime.tiers is not None and runtime.tiers.disk is not None:
        del configuration["tiers"]["disk"]["path"]
    del configuration["speculation"]["draft"]  # its leaf says what it is
    configuration["adapters"] = dict(adapters)  # what they are, not where they lie
    return combine(
        {
            "weights": weights,
            "draft": draft,
            "tokenizer": tokenizer_facts(folder),
            "template": template_facts(folder),
            "engine": engine_facts(),
            "device": device_facts(device),
            "configuration": configuration,
        }
    )


# ---- leaves -------------------------------------------------------------------------------------


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
        "config.json": _digest(canonical(read_json(folder / "config.json"))),
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
        "tokenizer.json": _digest((folder / "tokenizer.json").read_bytes()),
        "tokenizer_config.json": _digest(canonical(config)),
        "special_tokens_map.json": _digest(
            canonical(read_json(folder / "special_tokens_map.json"))
        ),
        "eos_token_id": ends,
    }


def template_facts(folder: Path) -> Facts:
    """Digests of the chat templates by name; empty for a model without any."""
    sources = template_sources(folder, read_json(folder / "tokenizer_config.json"))
    return {name: _digest(source.encode()) for name, source in sources.items()}


def engine_facts() -> Facts:
    """Our version and source text, and the versions of what computes and tokenizes."""
    return {
        "headgate": _version("headgate"),
        "source": source_digest(_ROOT),
        **{name: _version(name) for name in ("tokenizers", "torch", "transformers")},
    }


def source_digest(root: Path) -> str:
    """One digest over the text of our source files, whatever the order of a folder's listing."""
    whole = hashlib.sha256()
    for package in _SOURCES:
        for file in sorted((root / package).rglob("*")):
            if file.suffix not in _SOURCE_SUFFIXES:
                continue
            body = file.read_bytes()
            name = file.relative_to(root).as_posix()
            whole.update(f"{name}\0{len(body)}\0".encode() + body)
    return whole.hexdigest()


def device_facts(device: torch.device) -> Facts:
    """What computes: the same weights round differently on another processor."""
    if device.type == "cuda":
        name, detail = torch.cuda.get_device_name(device), torch.version.cuda
    else:
        name, detail = _processor(), torch.backends.cpu.get_cpu_capability()
    return {"type": device.type, "name": name, "detail": detail, "torch": torch.__version__}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
