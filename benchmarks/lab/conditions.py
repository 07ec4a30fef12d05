"""Under which conditions a number was measured. Names no host, no user and no path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from command.machine import cores, memory_bytes, processor

Scalar = str | int | float | bool | None

ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = ("torch", "transformers", "aiohttp", "uvicorn")


def gather(now: datetime | None = None) -> dict[str, Scalar]:
    """What holds for a whole run, read at its start."""
    name, flags = processor()
    memory = memory_bytes()
    return {
        "date": (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": name,
        "cpu_flags": " ".join(flags),
        "cores": cores(),
        "memory_gib": round(memory[0] / 2**30, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_at_start": load(),
    }


def load() -> float:
    """Runnable processes, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash, with a plus when tracked files differ from it; None outside a checkout."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = commit and _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed else commit


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
