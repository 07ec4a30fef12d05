"""C++ that ships as source: compiled once per machine, kept in the user's cache, loaded by ctypes.

Knows compilers and files; knows nothing of what the source computes. Whatever fails here, no
compiler, a read-only home, costs speed and nothing else: `load` says so in one line and gives None.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from runtime import processor

log = logging.getLogger(__name__)

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
_LINK = ("-fopenmp", "-fPIC", "-shared")
_COMPILE_S = 300


class CannotCompile(Exception):
    """No library comes of this source here; the message says why."""


def cache_folder() -> Path:
    """Where compiled code is kept: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headgate" / "native"


def load(source: Path, folder: Path) -> ctypes.CDLL | None:
    """The library of a C++ file, compiled into `folder` unless it is there; None, and one log line,
    where that cannot be done."""
    try:
        return ctypes.CDLL(str(_compiled(source, folder)))
    except (CannotCompile, OSError) as error:
        log.warning("%s is not used, answers are the same but slower: %s", source.name, error)
        return None


def _compiled(source: Path, folder: Path) -> Path:
    compiler = _compiler()
    version = _version(compiler)
    flags = [*_FLAGS, *_LINK]
    text = _text(source)
    told = "\n".join([version, *flags, processor.described()]).encode()
    library = folder / f"{source.stem}-{hashlib.sha256(text + told).hexdigest()[:24]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Under a name of its own until it is whole: several workers may compile at once.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "made.so"
        _run([compiler, *flags, str(source), "-o", str(made)])
        made.replace(library)
    log.info("%s is compiled: %s", source.name, library)
    return library


def compiler() -> str | None:
    """The compiler's name and version as it tells them itself; None where there is none."""
    try:
        return _version(_compiler()).partition("\n")[0].strip()
    except (CannotCompile, OSError):
        return None


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _text(source: Path) -> bytes:
    """A file and those beside it that it includes."""
    text = source.read_bytes()
    included = re.findall(rb'^#include "([^"]+)"', text, re.MULTILINE)
    return text + b"".join(_text(source.with_name(name.decode())) for name in included)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise CannotCompile("there is no C++ compiler (CXX, g++, clang++, c++)")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_COMPILE_S
        )
    except subprocess.TimeoutExpired as error:
        raise CannotCompile(f"{command[0]} takes longer than {_COMPILE_S} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        wrong = [line for line in said if "error" in line] or said or ["no message"]
        raise CannotCompile(f"{command[0]} fails: {wrong[0]}")
    return done.stdout
