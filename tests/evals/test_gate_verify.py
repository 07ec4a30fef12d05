"""`headgate gate verify`: what it prints and what it exits with."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

import headgate
from evals.controls import Facts
from evals.verdict_file import VERDICT_FILE, Rows, write_run
from tests.evals.simulated import BASE, OTHER, SPEC, hypothesis, observed


def run(folder: Path) -> tuple[int, str]:
    done = CliRunner().invoke(headgate.main, ["gate", "verify", str(folder)])
    return done.exit_code, done.output


def test_a_true_verdict_is_verified_and_a_forged_one_is_not(tmp_path: Path) -> None:
    """A fail that somebody made a pass of is found."""
    rows = Rows(hypothesis(), tuple(observed(wrong=0.3)), (BASE, OTHER), SPEC, 1.0, Facts())
    assert write_run(tmp_path, rows).decision == "fail"
    code, said = run(tmp_path)
    assert (code, said) == (
        0, "simulated: fail, as its rows say, to the byte (2,880 rows, 3 findings)\n"
    )  # fmt: skip
    file = tmp_path / VERDICT_FILE
    file.write_text(file.read_text().replace('"decision": "fail"', '"decision": "pass"'))
    code, said = run(tmp_path)
    assert code == 1
    assert "decision: the verdict says 'pass', its rows say 'fail'" in said


def test_a_folder_that_is_no_run_is_wrong_usage(tmp_path: Path) -> None:
    code, said = run(tmp_path / "nothing")
    assert code == 2
    assert "cannot be read: No such file" in said
