"""The one world that is too dear to build for every test."""

from __future__ import annotations

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
