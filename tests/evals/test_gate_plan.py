"""`headgate gate plan`: the table, the refusal, what is wrong with the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner

import headgate
from evals.controls import Facts
from evals.execute import prepare
from evals.pairs import CANDIDATE
from evals.strata import traces
from evals.verdict_file import Rows, write_run
from policies.hypothesis import Hypothesis
from policies.load import load_hypothesis
from tests.evals.simulated import BASE, OTHER, SPEC, hypothesis, observed

FILE = """\
apiVersion: headgate/v1
kind: Hypothesis
metadata: {name: small}
baseline: {config: base.yaml}
candidate: {patch: {runtime.weights: w8a8}}
kind_of_change: lossy_model
guardrails:
- {suite: qa, metric: correct, test: paired_ni, margin: 5%}
"""
SUITE = """\
apiVersion: headgate/v1
kind: Suite
name: qa
data: qa.jsonl
scorers: [{kind: exact}]
"""


def folder(path: Path, rows: int, text: str = FILE) -> Path:
    (path / "base.yaml").write_text("version: 1\nruntime: {model: pocket}\n")
    (path / "qa.yaml").write_text(SUITE)
    lines = [
        json.dumps({"id": f"q{n:05}", "prompt": f"{n}?", "expected": str(n)}) for n in range(rows)
    ]
    (path / "qa.jsonl").write_text("\n".join(lines) + "\n")
    file = path / "small.yaml"
    file.write_text(text)
    return file


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(headgate.main, ["gate", "plan", *map(str, arguments)])
    return done.exit_code, done.output


def test_enough_rows_are_planned_and_too_few_are_refused(tmp_path: Path) -> None:
    """With the margin that can be tested, which then is enough."""
    code, said = run(folder(tmp_path, 600))
    assert code == 0
    assert "600 pairs" in said
    file = folder(tmp_path, 90)
    code, said = run(file, "--json")
    told = json.loads(said)
    assert (code, told["refused"], told["rows"][0]["there"]) == (3, True, 90)
    testable = told["rows"][0]["testable"]
    assert 0.05 < testable < 0.2
    assert run(folder(tmp_path, 90, FILE.replace("5%", str(testable))))[0] == 0


def test_few_flips_need_few_rows(tmp_path: Path) -> None:
    file = folder(tmp_path, 90)
    assert run(file, "--flips", 0.0)[0] == 0
    assert run(file, "--flips", 0.2)[0] == 3


def test_an_earlier_run_tells_the_noise(tmp_path: Path) -> None:
    """Its second baseline never flipped, so that 90 rows are enough."""
    rows = Rows(hypothesis(), tuple(observed()), (BASE, OTHER), SPEC, 1.0, Facts())
    write_run(tmp_path / "run", rows)
    code, said = run(folder(tmp_path, 90), "--from", tmp_path / "run")
    assert code == 0
    assert "0.0% flips measured" in said


TOUCHING = (
    FILE.replace("runtime.weights: w8a8", "PATCH")
    .replace("lossy_model", "lossy_input")
    .replace("metric: correct", "metric: served")
)


def test_it_says_by_itself_how_many_requests_a_change_can_touch(tmp_path: Path) -> None:
    """By prompts over the budget; where nobody can know it says so, and which option finds out."""
    trim = "gateway.trim: {drop: oldest, budget_tokens: 64}"
    file = folder(tmp_path, 600, TOUCHING.replace("PATCH", trim))
    code, said = run(file)
    assert code == 3
    assert "touched in suite:qa: none of 600 requests (prompts over the budget of a trim)" in said
    assert "refused: the change touches no request" in said
    long = [
        json.dumps({"id": f"l{n:05}", "prompt": "one more word " * 30, "expected": "x"})
        for n in range(200)
    ]
    with (tmp_path / "qa.jsonl").open("a") as rows:
        rows.write("\n".join(long) + "\n")
    code, said = run(file)
    assert code == 0
    assert "touched in suite:qa: at most 200 of 800 requests" in said
    assert "guardrail 1 qa served paired_ni [affected]" in said
    told = json.loads(run(file, "--json")[1])
    assert (told["reach"][0]["touched"], told["reach"][0]["told"]) == (200, "rows")
    guessing = TOUCHING.replace("PATCH", "runtime.speculation: {proposer: ngram}")
    guessing = guessing.replace("lossy_input", "lossless_distribution")
    code, said = run(folder(tmp_path, 600, guessing))
    assert code == 0
    assert "touched in suite:qa: not known before a run" in said
    assert "--exposed SHARE plans for a share" in said


def test_the_last_run_of_a_hypothesis_says_how_many_its_change_touched(tmp_path: Path) -> None:
    """Unless it compared something else, such as another budget."""
    patch = {"gateway.trim": {"drop": "oldest", "budget_tokens": 64}}
    file = folder(
        tmp_path,
        600,
        TOUCHING.replace("PATCH", f"gateway.trim: {json.dumps(patch['gateway.trim'])}"),
    )
    rows = [
        replace(one, trimmed_tokens=9) if one.arm == CANDIDATE and one.id < "q00100" else one
        for one in observed()
        if one.source == "suite:qa"
    ]
    for budget, told in (
        (64, "150 of 600 requests (as many as on 1970-01-01 in small-"),
        (65, "none of 600"),
    ):
        change = {"gateway.trim": {"drop": "oldest", "budget_tokens": budget}}
        asked = hypothesis(
            metadata={"name": "small"}, kind_of_change="lossy_input", candidate={"patch": change}
        )
        made = Rows(asked, tuple(rows), (BASE, OTHER), SPEC, 1.0, Facts())
        write_run(tmp_path / ".headgate" / "runs" / f"small-{budget:08}", made)
        assert f"touched in suite:qa: {told}" in run(file)[1]


def test_what_cannot_be_asked_is_told_at_its_place(tmp_path: Path) -> None:
    code, said = run(folder(tmp_path, 9, FILE.replace("metric: correct", "metric: tftt.p95")))
    assert code == 2
    assert "small.yaml:8:" in said
    assert "guardrails[0].metric" in said
    assert "did you mean 'ttft.p95'" in said
    code, said = run(folder(tmp_path, 9, FILE.replace("suite: qa", "suite: qb")))
    assert code == 2
    assert "there is no suite 'qb'" in said
    assert run(folder(tmp_path, 9), "--from", tmp_path / "nothing")[0] == 2


def test_what_a_candidates_own_file_touches_is_known_as_of_a_patch(tmp_path: Path) -> None:
    """It was taken to touch every request, so that nothing guarded against dilution; and what is
    recorded of the run says the same to whoever verifies it."""
    by_file = FILE.replace("lossy_model", "lossy_input").replace(
        "{patch: {runtime.weights: w8a8}}",
        "{config: other.yaml, patch: {gateway.trim.drop: middle}}",
    )
    file = folder(tmp_path, 600, by_file)
    (tmp_path / "other.yaml").write_text(
        "version: 1\ngateway: {trim: {budget_tokens: 64, keep_share: 0.25}}\n"
        "runtime: {model: pocket}\n"
    )
    plan = prepare(file)
    assert plan.hypothesis.candidate.patch == {
        "gateway.trim.drop": "middle",
        "gateway.trim.budget_tokens": 64,
        "gateway.trim.keep_share": 0.25,
    }
    assert traces(plan.hypothesis) == ("trimmed_tokens",)
    assert traces(load_hypothesis(file)) == ("trimmed_tokens",)  # of the patch alone
    file.write_text(by_file.replace(", patch: {gateway.trim.drop: middle}", ""))
    assert traces(load_hypothesis(file)) == ()
    assert traces(prepare(file).hypothesis) == ("trimmed_tokens",)
    assert "none of 600 requests (prompts over the budget of a trim)" in run(file)[1]
    recorded = plan.hypothesis.model_dump_json()
    assert Hypothesis.model_validate_json(recorded) == plan.hypothesis
    patched = folder(tmp_path, 600)
    assert prepare(patched).hypothesis == load_hypothesis(patched)
