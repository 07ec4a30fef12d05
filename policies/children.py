"""Programs of ours that a program of ours starts: they die with it, and find our packages.

Knows no program.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import site
import sys
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def dying_with(parent: int) -> Callable[[], None] | None:
    """What a child runs before its program: the kernel kills it when its parent dies, even by
    SIGKILL (prctl(2)). None where there is no such thing."""
    if sys.platform != "linux":
        return None
    return functools.partial(_die_with, ctypes.CDLL(None), parent)


def _die_with(libc: ctypes.CDLL, parent: int) -> None:
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def package_environment() -> dict[str, str]:
    """With it a program finds our packages wherever it starts."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {"PYTHONUNBUFFERED": "1"}
    if root not in (*site.getsitepackages(), site.getusersitepackages()):
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
