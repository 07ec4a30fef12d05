"""`headgate gate report`: from the two files that a run leaves to the three that people read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from evals.controls import Facts
from evals.pairs import AA, BASELINE, CANDIDATE
from evals.report.files import NAMES
from evals.verdict import Side
from evals.verdict_file import PAIRS_FILE, Rows, write_run
from headgate import main
from policies.hypothesis import Hypothesis
from telemetry import Observation

HYPOTHESIS = {
    "apiVersion": "headgate/v1",
    "kind": "Hypothesis",
    "metadata": {"name": "int8"},
    "baseline": {"config": "base.yaml"},
    "candidate": {"patch": {"runtime.weights": "w8a8"}},
    "kind_of_change": "lossy_model",
    "guardrails": [{"suite": "qa", "metric": "correct", "test": "paired_ni", "margin": 0.05}],
    "claims": [{"suite": "qa", "metric": "tpot.p50", "direction": "lower", "min_effect": "8%"}],
}


def a_run(folder: Path, lost_every: int = 10) -> Path:
    """Two hundred answers of three arms; the candidate is twice as fast and loses some."""
    rows = [
        Observation(
            f"q{at}", "suite:qa", arm, f"q{at}", block=at // 10, at_s=float(at),
            tpot_s=0.01 if arm == CANDIDATE else 0.02, text=f"answer {at}", completion_tokens=9,
            scores={"correct": float(arm != CANDIDATE or at % lost_every != 0)},
        )
        for at in range(200)
        for arm in (BASELINE, CANDIDATE, AA)
    ]  # fmt: skip
    sides = Side("b" * 64, {"weights": "b"}), Side("c" * 64, {"weights": "c"})
    spec = Side("d" * 64, {"hypothesis": "d"})
    hypothesis = Hypothesis.model_validate(HYPOTHESIS)
    write_run(folder, Rows(hypothesis, tuple(rows), sides, spec, 1_790_000_000.0, Facts()))
    return folder


def typed(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["gate", "report", *map(str, words)])
    return done.exit_code, done.output


def test_all_three_are_written_beside_the_verdict(tmp_path: Path) -> None:
    code, said = typed(a_run(tmp_path / "run"))
    assert code == 0
    assert [Path(line).name for line in said.splitlines()] == list(NAMES)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "20 lost: right before, wrong now" in page
    assert "lost 20, gained 0" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_one_form_is_printed_and_nothing_written(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    there = sorted(run.iterdir())
    code, said = typed(run / "verdict.json", "--print", "md")
    assert code == 0 and said.startswith("## ")
    assert typed(run, "--print", "junit")[1].startswith("<?xml")
    assert sorted(run.iterdir()) == there


def test_without_its_pairs_a_verdict_is_still_a_page(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / PAIRS_FILE).unlink()
    code, said = typed(run, "--print", "html")
    assert code == 0
    assert "What must not be lost" in said and "Lost answers" not in said


def test_a_hypothesis_means_its_newest_run(tmp_path: Path) -> None:
    """Not the run of another one whose name begins alike."""
    file = tmp_path / "some.yaml"
    file.write_text(json.dumps(HYPOTHESIS))
    for age, name in enumerate(("int8-kv-00000000", "int8-22222222", "int8-11111111")):
        run = a_run(tmp_path / ".headgate" / "runs" / name, lost_every=10 + 10 * age)
        os.utime(run / "verdict.json", (1_000_000 - age, 1_000_000 - age))
    code, said = typed(file)
    assert code == 0
    assert {Path(line).parent.name for line in said.splitlines()} == {"int8-22222222"}


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"hypothesis": 1}'])
def test_a_broken_verdict_is_told_and_nothing_is_written(tmp_path: Path, broken: str) -> None:
    (tmp_path / "verdict.json").write_text(broken)
    code, said = typed(tmp_path)
    assert code == 2 and "verdict.json" in said
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]


def test_a_hypothesis_that_has_not_run_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "int8.yaml"
    file.write_text(json.dumps(HYPOTHESIS))
    code, said = typed(file)
    assert code == 2 and f"headgate gate run {file}" in said
    assert typed(tmp_path / "no.yaml")[0] == 2
