"""What computes here, by the names that a policy may ask for: a fact that only torch knows.

Asks `python -m runtime --devices` once, unless whoever started this process has asked already.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "HEADGATE_DEVICES"
_ASK_S = 300.0  # torch alone imports for a minute where others use the cores

Devices = Mapping[str, Mapping[str, Any]]  # `auto`, `cpu`, `cuda` -> facts


class DevicesUnknown(Exception):
    """Torch is not here, or does not say."""


def devices() -> Devices:
    """Raises DevicesUnknown."""
    told = os.environ.get(VARIABLE)
    return _read(told) if told else _ask()


def asked() -> dict[str, str]:
    """For the environment of programs that this one starts: what it has had to ask."""
    return {VARIABLE: json.dumps(devices())} if _ask.cache_info().currsize else {}


@functools.cache
def _ask() -> Devices:
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    argv = [sys.executable, "-P", "-m", "runtime", "--devices"]
    try:
        done = subprocess.run(  # our own program
            argv,
            check=False,
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DevicesUnknown(f"python -m runtime --devices does not answer: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise DevicesUnknown(f"python -m runtime --devices failed: {last[:200]}")
    return _read(done.stdout)


def _read(text: str) -> Devices:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "auto" not in found:
        raise DevicesUnknown(f"expected devices by name, got {text[:60]!r}")
    return found
