"""`python deploy/requirements.py EXTRA...`: what pyproject.toml asks for, a line a requirement.

Images install packages before the source, so that a change of the source does not fetch them again.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: Sequence[str], project: Path = PROJECT) -> list[str]:
    """Those of everybody and of these extras. Raises KeyError for an extra that there is not."""
    told = tomllib.loads(project.read_text())["project"]
    optional = told["optional-dependencies"]
    return [*told["dependencies"], *(one for extra in extras for one in optional[extra])]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
