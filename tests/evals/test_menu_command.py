"""`headgate menu`: what is measured, what is read again, and what becomes of what cannot be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from evals.commands.menu import Options, measured, tell
from evals.controls import Facts
from evals.execute import Prepared
from evals.menu import Row, Workload
from evals.pairs import AA, BASELINE, CANDIDATE
from evals.residence import MEMORY_FILE
from evals.techniques import technique
from evals.verdict_file import Rows, write_run
from headgate import main
from telemetry import Observation

ROWS = [{"id": f"q{at}", "prompt": "one and one", "expected": "two"} for at in range(40)]
SUITE = "apiVersion: headgate/v1\nkind: Suite\nname: qa\ndata: rows.jsonl\nscorers: [{kind: exact}]"


def world(folder: Path) -> Options:
    """A policy for pocket, and a suite of forty rows."""
    (folder / "policy.yaml").write_text("version: 1\nruntime: {model: pocket}\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "qa.yaml").write_text(SUITE)
    workload = Workload(("../qa.yaml",), max_pairs=40)
    return Options(folder / "policy.yaml", workload, price=None, again=False)


def observed(source: str) -> list[Observation]:
    """What a run of the suite might be: the candidate is twice as fast and loses one answer."""
    return [
        Observation(
            f"q{at}", source, arm, f"q{at}", block=at // 10, at_s=float(at),
            ttft_s=0.2 / speed, tpot_s=0.02 / speed, e2e_s=1 / speed, completion_tokens=40,
            scores={"correct": float(arm != CANDIDATE or at != 7)},
        )
        for at in range(40)
        for arm, speed in ((BASELINE, 1), (CANDIDATE, 2), (AA, 1))
    ]  # fmt: skip


class Bench:
    """Measures by writing down what a run would have left; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, plan: Prepared) -> None:
        self.asked.append(plan.hypothesis.name)
        seen = observed(plan.hypothesis.sources[0])
        rows = Rows(plan.hypothesis, tuple(seen), plan.sides, plan.spec, 1.8e9, Facts())
        write_run(plan.folder, rows)
        memory = {BASELINE: 400 * 2**20, CANDIDATE: 200 * 2**20}
        (plan.folder / MEMORY_FILE).write_text(json.dumps(memory))


def tried(options: Options, bench: Bench, names: Sequence[str]) -> list[Row]:
    techniques = [technique(name, options.policy.parent) for name in names]
    return asyncio.run(measured(options, techniques, bench))


def test_rows_are_measured_once_and_again_when_asked_or_when_the_policy_changed(
    tmp_path: Path,
) -> None:
    options, bench = world(tmp_path), Bench()
    (row,) = tried(options, bench, ["w8a8"])
    assert (row.lost, row.gained, row.pairs) == (1, 0, 40)
    assert row.figures.ttft_p50_s == pytest.approx(0.1)
    assert row.figures.memory_bytes == 200 * 2**20
    assert (Path(row.run) / "report.html").exists()
    first, second = tried(options, bench, ["w8a8", "ngram"])
    assert bench.asked == ["menu-w8a8", "menu-ngram"]
    assert first == row and second.name == "ngram"
    tried(replace(options, again=True), bench, ["ngram"])
    options.policy.write_text("version: 1\nruntime: {model: pocket, step_tokens: 1024}\n")
    tried(options, bench, ["w8a8"])
    assert bench.asked == ["menu-w8a8", "menu-ngram", "menu-ngram", "menu-w8a8"]


def test_one_that_cannot_be_measured_says_why_and_the_others_are(tmp_path: Path) -> None:
    """A knob with a value that there is not; the table is written all the same."""
    options = world(tmp_path)
    broken, good = tried(options, Bench(), ["runtime.kv=int7", "w8a8"])
    assert broken.decision == "refused" and "int8" in broken.reason
    assert good.decision != "refused"
    said = tell(options, [broken, good], as_json=False)
    assert "runtime.kv=int7" in said and "w8a8" in said
    assert (tmp_path / "menu" / "menu.html").read_text("utf-8").startswith("<!doctype html>")
    told = json.loads(tell(options, [broken, good], as_json=True))
    assert [one["name"] for one in told] == ["runtime.kv=int7", "w8a8"]
    assert json.loads((tmp_path / "menu" / "menu.json").read_text("utf-8")) == told


def typed(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["menu", *map(str, words)])
    return done.exit_code, done.output


def test_what_is_typed_wrong_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    options = world(tmp_path)
    suite = tmp_path / "qa.yaml"
    assert typed(options.policy, "--try", "w8a8") == (
        2, "nothing to measure on: give --suite, --replay, or both\n"
    )  # fmt: skip
    code, said = typed(options.policy, "--suite", suite)
    assert code == 2 and said.startswith("nothing to try")
    code, said = typed(options.policy, "--suite", suite, "--try", "w8a9")
    assert code == 2 and "did you mean 'w8a8'" in said
    code, said = typed(options.policy, "--suite", suite, "--try", "w8a8", "--margin", "300%")
    assert code == 2 and "such as 0.03 or 3%" in said
    code, said = typed(tmp_path / "no.yaml", "--suite", suite, "--try", "w8a8")
    assert code == 2 and "no.yaml" in said
    assert not (tmp_path / "menu").exists()


def test_what_is_wrong_with_every_row_ends_it_at_once(tmp_path: Path) -> None:
    """A suite that is not there: no table of rows that all say the same."""
    options = world(tmp_path)
    tries = ("--try", "w8a8", "--try", "ngram", "--margin", "3%")
    code, said = typed(options.policy, "--suite", "pockett", *tries)
    assert code == 2 and "did you mean 'pocket'" in said
    assert "technique" not in said
