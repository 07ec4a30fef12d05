"""`headgate gate new`: what it writes is a hypothesis."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from evals.commands.new import new
from policies.load import load_hypothesis


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("runtime.kv=int8", "lossy_model"),
        ("runtime.step_tokens=512", "lossless_exact"),
        ("gateway.trim={drop: oldest}", "lossy_input"),
        ("gateway.routing.policy=round_robin", "routing_only"),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, change: str, kind: str) -> None:
    """With the kind of change that the knob is, and guardrails; a second time it is refused."""
    file = tmp_path / "try.yaml"
    done = CliRunner().invoke(new, [str(file), "--set", change])
    assert done.exit_code == 0, done.output
    read = load_hypothesis(file)
    assert (read.name, read.kind_of_change) == ("try", kind)
    assert len(read.guardrails) == 3
    again = CliRunner().invoke(new, [str(file), "--set", change])
    assert (again.exit_code, again.stderr) == (2, f"{file}  is there already\n")


def test_what_is_no_knob_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "try.yaml"
    done = CliRunner().invoke(new, [str(file), "--set", "runtime.kb=int8"])
    assert done.exit_code == 2
    assert "did you mean 'runtime.kv'?" in done.stderr
    assert not file.exists()
