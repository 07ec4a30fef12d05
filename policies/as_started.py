"""Which bytes a policy's path stands for: the file's own, or a copy of what it said at some moment.

For programs of a run that goes on by the policy that it was started with, and by what its gateways
have taken of it since, whatever an operator writes meanwhile. Names, lines and relative paths stay
those of the file itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

AS_STARTED = "HEADGATE_POLICY_AS_STARTED"  # JSON: absolute path of a policy -> path of its copy


def copied(file: Path, folder: Path) -> Path:
    """A copy of what the file says now, in the folder of a run."""
    copy = folder / "policy.yaml"
    copy.write_bytes(file.read_bytes())
    return copy


def taken(text: bytes, copy: Path) -> None:
    """From now on the copy says this, whole at any moment; several programs may say so at once.
    Raises OSError."""
    beside = copy.with_name(f".{copy.name}.{os.getpid()}")
    beside.write_bytes(text)
    beside.replace(copy)


def environment(file: Path, copy: str | Path) -> dict[str, str]:
    """Lets a program read the copy wherever it would read the file."""
    return {AS_STARTED: json.dumps({str(file.absolute()): str(copy)})}


def place_of(file: str | Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the file's text is to be read."""
    copies = json.loads(environ.get(AS_STARTED) or "{}")
    return Path(copies.get(str(Path(file).absolute()), file))


@contextmanager
def reading(file: Path, copy: str | Path) -> Iterator[None]:
    """Meanwhile, in this program, too: for its beginning, before anything else runs."""
    before = os.environ.get(AS_STARTED)
    os.environ.update(environment(file, copy))
    try:
        yield
    finally:
        del os.environ[AS_STARTED]
        if before is not None:
            os.environ[AS_STARTED] = before
