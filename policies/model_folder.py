"""`runtime.model` -> a folder that can be served, or a hub name. Reads names and shapes only.

Knows the layout of a Hugging Face folder; knows neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from policies.schema import Runtime

POCKET = "pocket"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HEADER_BYTES = 100_000_000  # the format allows no more
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class ModelError(Exception):
    """There is no such model, or its folder cannot be served."""

    def __init__(self, message: str, suggestion: str | None = None) -> None:
        super().__init__(message)
        self.suggestion = suggestion


def pocket_folder(part: str = "target") -> Path:
    """The folder of the model that ships, found beside the package without importing it."""
    spec = importlib.util.find_spec(POCKET)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the package `pocket` is not installed: install headgate again")
    return Path(next(iter(spec.submodule_search_locations))) / part


def served_name(runtime: Runtime, model: Path | str) -> str:
    """What clients send as `model`: `served_name`, else the last part of the folder or hub name."""
    return runtime.served_name or (POCKET if runtime.model == POCKET else Path(model).name)


def find_model(name: str, beside: Path) -> Path | str:
    """A checked folder, or a hub name as it is. `beside` is the folder of the policy file.

    Raises ModelError.
    """
    if name == POCKET:
        folder = pocket_folder()
        if not folder.is_dir():
            raise ModelError(
                f"the pocket model's folder {folder} is missing: install headgate again"
            )
        check_folder(folder)
        return folder
    try:
        folder = beside / Path(name).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody, too long, a null byte
        raise ModelError(f"{name[:60]!r} is not a usable folder name: {error}") from None
    if exists:
        check_folder(folder)
        return folder  # symlinks keep their names: clients send the last part
    if _looks_like_a_path(name, beside):
        raise ModelError(f"no such folder: {folder}", _nearby(folder, name))
    if is_hub_name(name):
        return name
    message = (
        f"{name[:60]!r} is neither `{POCKET}`, nor a folder beside the policy file, nor a hub name "
        "such as owner/name"
    )
    raise ModelError(message, _nearby(folder, name))


def is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None


def hub_folder(
    name: str, revision: str | None = None, environ: Mapping[str, str] = os.environ
) -> Path | None:
    """Where this machine has a model of the hub that it once fetched; None where it has not.

    Layout and variables: huggingface_hub, "Understand caching".
    """
    if not is_hub_name(name):
        return None
    home = environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    kept = cache / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = (kept / "refs" / wanted).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = wanted
    folder = kept / "snapshots" / commit
    return folder if folder.is_dir() else None


def tokenizer_folder(name: str, beside: Path) -> Path | None:
    """Where the tokenizer of servers elsewhere is: in a folder beside the policy file, else where
    this machine has what the hub calls so."""
    for place in (beside / name, hub_folder(name)):
        if place is not None and (place / "tokenizer.json").is_file():
            return place
    return None


def find_draft(name: str, beside: Path) -> Path | str:
    """The same for a model that guesses; `pocket` is the pocket model's. Raises ModelError."""
    if name != POCKET:
        return find_model(name, beside)
    folder = pocket_folder("draft")
    check_folder(folder)
    return folder


def refuse_large_draft(draft: Path | str, model: Path | str) -> None:
    """Raises ModelError for a draft with no fewer weights than the model.

    Bytes do not tell: either may be kept in fp32, and in bf16 is what the other is read as.
    """
    if not isinstance(draft, Path) or not isinstance(model, Path):
        return
    its, most = _weight_count(draft), _weight_count(model)
    if its is not None and most is not None and its >= most:
        raise ModelError(
            f"the draft {draft} has {its:,} weights, the model {most:,}: a draft has to be "
            "smaller, or guessing costs more than it can save"
        )


def _weight_count(folder: Path) -> int | None:
    """By the headers of the files; None where weights are packed into integers, or a header is
    not read here: whoever loads the model says what is wrong with it.

    https://github.com/huggingface/safetensors#format
    """
    count = 0
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(min(size, _HEADER_BYTES)))
            tensors = [one for name, one in header.items() if name != "__metadata__"]
            if any(one["dtype"][0] in "IU" for one in tensors):
                return None
            count += sum(math.prod(one["shape"]) for one in tensors)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
    return count


def _looks_like_a_path(name: str, beside: Path) -> bool:
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        return True
    parent, slash, _ = name.rpartition("/")
    return bool(slash) and (beside / parent).is_dir()


def _nearby(folder: Path, name: str) -> str | None:
    """`pocket` or a folder beside the missing one, if its name is close."""
    from policies.problems import closest

    try:
        siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    except OSError:
        siblings = []
    near = closest(folder.name, siblings)
    if near:
        return name.rstrip("/").removesuffix(folder.name) + near
    return closest(name, [POCKET])


def check_folder(folder: Path) -> None:
    """Raises ModelError with the first thing that keeps this folder from being served."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is a file, expected a Hugging Face folder")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}") from None
    if "config.json" not in names:
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    _read_object(folder / "config.json")
    _check_weights(folder, names)
    if "tokenizer.json" not in names:
        raise ModelError(
            f"{folder} has no tokenizer.json: save the tokenizer there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def _check_weights(folder: Path, names: list[str]) -> None:
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(_PICKLES)]
        if pickles:
            raise ModelError(
                f"{folder} has only pickle weights ({pickles[0]}); only safetensors are "
                "loaded: pickle files can run code; convert with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) if you trust them"
            )
        raise ModelError(f"{folder} has no weights: expected *.safetensors")
    if "model.safetensors.index.json" in names:
        index = _read_object(folder / "model.safetensors.index.json")
        shards = index.get("weight_map")
        wanted = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        missing = sorted(wanted - set(names))
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of {len(wanted)} weight files: {missing[0]}"
            )


def _read_object(file: Path) -> dict[str, object]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} does not hold a JSON object")
    return data
