"""Where the suites and replays lie that a hypothesis names. Knows names, reads no file."""

from __future__ import annotations

import stat
from importlib.util import find_spec
from pathlib import Path

from policies.problems import closest

SUITE_ENDINGS = (".yaml", ".yml")
REPLAY_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".csv.gz")


class NoEvidence(Exception):
    """There is no such suite or replay."""

    def __init__(self, message: str, suggestion: str | None = None) -> None:
        super().__init__(message)
        self.suggestion = suggestion


def find_source(source: str, hypothesis: str | Path) -> Path:
    """The file, or folder of a replay, of `suite:NAME` or `replay:NAME`. Raises NoEvidence."""
    kind, _, name = source.partition(":")
    beside = Path(hypothesis).absolute().parent
    endings = SUITE_ENDINGS if kind == "suite" else REPLAY_ENDINGS
    folders = [beside, beside / f"{kind}s", *_shipped(kind)]
    for folder in folders:
        for ending in ("", *endings):
            found = folder / f"{name}{ending}"
            if _is_there(found, folder_too=kind == "replay"):
                return found
    there = sorted(
        file.name.removesuffix(ending)
        for folder in folders
        for ending in endings
        for file in folder.glob(f"*{ending}")
    )
    looked = ", ".join(str(folder) for folder in folders)
    raise NoEvidence(f"there is no {kind} {name!r}; looked in {looked}", closest(name, there))


def _is_there(path: Path, *, folder_too: bool) -> bool:
    """Not where it cannot be looked for: a folder that is closed to who asks, a name too long."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode) or (folder_too and stat.S_ISDIR(mode))


def _shipped(kind: str) -> list[Path]:
    spec = find_spec("evals")
    if spec is None or not spec.submodule_search_locations:
        return []
    data = Path(next(iter(spec.submodule_search_locations))) / "data"
    return [data if kind == "suite" else data / "replays"]
