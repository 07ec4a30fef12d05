"""The hypotheses that ship: each loads, makes two configurations, and finds its evidence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import policies
from policies.evidence import find_source
from policies.load import load_hypothesis
from policies.patching import differences, variants

FOLDER = Path(policies.__file__).parent / "hypotheses"
FILES = sorted(file for file in FOLDER.glob("*.yaml") if file.name != "base.yaml")


def test_there_is_one_for_each_technique_of_the_menu() -> None:
    assert {file.stem for file in FILES} == {
        "weights-w8a8", "weights-int4", "kv-int8", "speculation-draft", "speculation-ngram",
        "chunked-prefill", "routing-prefix", "trim-batch", "trim-sliding", "response-cache",
    }  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_hypothesis_can_be_run_as_it_is(file: Path) -> None:
    """It is called as its file, changes something, claims something, and its evidence is there."""
    hypothesis = load_hypothesis(file)
    baseline, candidate = variants(file, hypothesis)
    assert hypothesis.name == file.stem
    assert baseline is not None
    assert candidate is not None
    assert differences(baseline.deployment, candidate.deployment)
    assert hypothesis.claims
    for source in hypothesis.sources:
        assert find_source(source, file).is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_hypothesis_can_be_shown_by_the_rows_that_ship(file: Path) -> None:
    """`headgate gate plan` lets it through."""
    done = subprocess.run(
        [sys.executable, "-m", "headgate", "gate", "plan", str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
