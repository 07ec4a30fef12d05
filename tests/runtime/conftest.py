"""The worlds that are too dear to build for every test."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "models" / "stories260K"


@pytest.fixture(scope="session")
def stories260k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained Llama as an ordinary model folder."""
    if not STORIES.is_dir():
        pytest.skip(f"needs the stories260K model in {STORIES}")
    from tests.runtime.stories260k import convert

    return convert(STORIES, tmp_path_factory.mktemp("models") / "stories260K")


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled kernels; whoever needs it is skipped where nothing can compile it."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs a C++ compiler")
    from runtime.paged_kernel import load_library

    library = load_library(tmp_path_factory.mktemp("native"))
    assert library is not None, "there is a compiler, but the kernel does not come of it"
    return library
