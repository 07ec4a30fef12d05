"""`headgate gate run` over real servers: what is lost, slow, idle, dead or killed is found out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pocket.tasks import rows
from tests.end_to_end.stack import ENVIRONMENT, ROOT, START_S, Stack, until

NOBODY = "http://127.0.0.1:9"  # discard: nothing listens
SUITE = """\
apiVersion: headgate/v1
kind: Suite
name: facts
data: facts.jsonl
max_tokens: 24
temperature: 0
scorers: [{kind: exact}]
"""
HYPOTHESIS = """\
apiVersion: headgate/v1
kind: Hypothesis
metadata: {{name: {name}}}
baseline: {{{baseline}}}
candidate: {{{candidate}}}
kind_of_change: lossy_model
{claims}
guardrails:
{guardrails}
design: {{{design}}}
stats: {{flips: 0, {stats}}}
{more}
"""
QUIET = "aa_control: false, sabotage_control: false"
BASE = "version: 1\nruntime: {model: pocket, kv_tokens: 8192, threads: 1}\n"
LOST = "- {suite: facts, metric: lost, test: rate_max, max: 5%}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of the task that the pocket model does best, with short prompts and answers."""
    place = tmp_path_factory.mktemp("gate")
    (place / "facts.yaml").write_text(SUITE)
    lines = []
    for at, row in enumerate(rows("repeat", "test", seed=3, count=480)):
        asked = {"id": f"r{at}", "messages": row.messages, "expected": row.answer}
        lines.append(json.dumps(asked, ensure_ascii=False))
    (place / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place


def hypothesis(
    folder: Path,
    name: str,
    baseline: str,
    candidate: str,
    guardrails: str = LOST,
    *,
    claims: str = "",
    design: str = QUIET,
    pairs: int = 60,
    stats: str = "",
    more: str = "",
) -> Path:
    stats = f"max_pairs: {pairs}" + (f", {stats}" if stats else "")
    file = folder / f"{name}.yaml"
    file.write_text(
        HYPOTHESIS.format(
            name=name, baseline=baseline, candidate=candidate, claims=claims,
            guardrails=guardrails, design=design, stats=stats, more=more,
        )
    )  # fmt: skip
    return file


def gate(file: Path, *options: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "headgate", "gate", "run", str(file), *options],
        cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def verdict(file: Path) -> tuple[int, dict[str, Any]]:
    code, out, err = gate(file, "--json")
    assert out, err
    return code, json.loads(out)


@contextmanager
def spoiled(stack: Stack, *options: str) -> Iterator[str]:
    """A server with a planted defect: the real one behind a proxy of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "evals.sabotage", stack.gateway.url, *options],
        cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_three_points_lost_and_fifteen_percent_slower_are_each_failed(
    folder: Path, stack: Stack
) -> None:
    """Planted into the real server: 3 % of answers wrong, all of them 15 % later. Both are shown to
    be beyond their margins, each by itself.
    """
    rails = (
        "- {suite: facts, metric: lost, test: rate_max, max: 1%}\n"
        "- {suite: facts, metric: e2e.mean, test: ratio_ni, margin: 4%}"
    )
    with spoiled(stack, "--wrong", "0.03", "--slow", "0.15", "--seed", "10") as url:
        file = hypothesis(
            folder, "planted", f'url: "{stack.gateway.url}"', f'url: "{url}"', rails,
            design=f"{QUIET}, block_items: 5, concurrency: 1", pairs=320,
        )  # fmt: skip
        code, found = verdict(file)
    by_metric = {one["metric"]: one for one in found["findings"]}
    assert (code, found["decision"]) == (1, "fail"), found["reasons"]
    assert by_metric["lost"]["decision"] == "fail"
    assert by_metric["e2e.mean"]["decision"] == "fail", by_metric["e2e.mean"]
    assert by_metric["e2e.mean"]["low"] > 1.04
    assert all(one["ok"] for one in found["controls"])


def test_the_same_again_loses_nothing_and_gains_nothing(folder: Path) -> None:
    """Both configurations are started, with the baseline again and a spoiled baseline beside them:
    nothing is lost, the spoiled one is found out, and `no_benefit` is recorded.
    """
    (folder / "base.yaml").write_text(BASE)
    rails = (
        "- {suite: facts, metric: correct, test: paired_ni, margin: 5%}\n"
        "- {suite: facts, metric: lost, test: rate_max, max: 5%}"
    )
    file = hypothesis(
        folder, "same", "config: base.yaml", "patch: {runtime.weights: auto}", rails,
        claims="claims: [{suite: facts, metric: correct, direction: higher, min_effect: 5%}]",
        design="block_items: 8, sabotage_wrong: 25%, control_share: 100%", pairs=96,
    )  # fmt: skip
    code, found = verdict(file)
    assert (code, found["decision"]) == (5, "no_benefit"), (found["reasons"], found["controls"])
    controls = {one["name"]: one["ok"] for one in found["controls"]}
    assert controls["aa"]
    assert controls["sabotage"]
    assert found["baseline"]["root"] == found["candidate"]["root"]
    lines = (folder / ".headgate" / "ledger" / "decisions.jsonl").read_text().splitlines()
    assert [json.loads(line)["decision"] for line in lines if '"same"' in line] == ["no_benefit"]
    (run,) = (folder / ".headgate" / "runs").glob("same-*")
    assert {"verdict.json", "pairs.jsonl.zst", "journal.jsonl"} <= {f.name for f in run.iterdir()}


def test_an_optimization_that_never_ran_is_no_optimization(folder: Path, stack: Stack) -> None:
    """Nothing is lost; and nothing guessed, which it was meant to."""
    url = f'url: "{stack.gateway.url}"'
    file = hypothesis(
        folder, "idle", url, f"{url}, model: pocket", more="activation: [{metric: accepted_tokens}]"
    )
    code, found = verdict(file)
    assert (code, found["decision"], found["reason"]) == (4, "invalid", "not_activated")


def test_a_counter_that_the_candidate_does_not_have_ends_a_run_at_its_beginning(
    folder: Path, stack: Stack
) -> None:
    """It would be told after everything was asked, otherwise."""
    url = f'url: "{stack.gateway.url}"'
    more = "activation: [{metric: replica_request}]"
    file = hypothesis(folder, "uncounted", url, f"{url}, model: pocket", more=more)
    code, out, err = gate(file)
    assert (code, out) == (2, "")
    assert f"{file}:12:23  activation[0].metric  nothing counts 'replica_request' at the" in err
    assert err.rstrip().endswith("did you mean 'replica_requests'?")
    assert not [*(folder / ".headgate" / "runs").glob("uncounted-*")]


def test_a_dead_server_makes_a_run_invalid_and_never_a_pass(folder: Path, stack: Stack) -> None:
    """It is found out within a block; nothing more is spent."""
    file = hypothesis(folder, "dead", f'url: "{stack.gateway.url}"', f'url: "{NOBODY}"')
    code, found = verdict(file)
    assert (code, found["decision"], found["reason"]) == (4, "invalid", "errors")
    assert found["design"]["blocks_done"] == 2


def test_a_configuration_that_cannot_be_served_makes_a_run_invalid(
    folder: Path, stack: Stack
) -> None:
    """Its server's last words are the reason."""
    (folder / "base.yaml").write_text(BASE)
    file = hypothesis(
        folder, "unserved", f'url: "{stack.gateway.url}"', "config: base.yaml",
    )  # fmt: skip
    base = folder / "base.yaml"
    base.write_text(BASE.replace("kv_tokens: 8192", "kv_tokens: 8192, weights: fp8"))
    code, out, err = gate(file, "--json")
    base.write_text(BASE)
    found = json.loads(out)
    assert (code, found["decision"], found["reason"]) == (4, "invalid", "errors"), err
    assert "ended before it served; its last words:" in err
    assert "fp8" in err


def test_too_few_rows_are_refused_before_anything_is_asked(folder: Path, stack: Stack) -> None:
    """With the margin that so many rows can show."""
    rail = "- {suite: facts, metric: correct, test: paired_ni, margin: 1%}"
    url = f'url: "{stack.gateway.url}"'
    file = hypothesis(folder, "few", url, f"{url}, model: pocket", rail)
    code, out, err = gate(file)
    assert (code, out) == (3, "")
    assert "refused: guardrail 1 facts correct paired_ni cannot be shown" in err
    assert "testable is" in err
    assert not list((folder / ".headgate" / "runs").glob("few-*"))


def test_a_killed_run_goes_on_where_it_was(folder: Path, stack: Stack) -> None:
    """SIGKILL in the middle: what was written stands, nothing is asked twice, and the second run's
    verdict is over all of it.
    """
    url = f'url: "{stack.gateway.url}"'
    file = hypothesis(
        folder, "killed", url, f"{url}, model: pocket", design=f"{QUIET}, block_items: 5"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "headgate", "gate", "run", str(file)],
        cwd=ROOT, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip

    def written() -> list[str]:
        runs = list((folder / ".headgate" / "runs").glob("killed-*/journal.jsonl"))
        return runs[0].read_text().split("\n")[:-1] if runs else []

    until(lambda: len(written()) >= 4, START_S, lambda: "no block was written")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = written()
    assert len(before) < 24
    code, _, err = gate(file)
    assert "going on with" in err
    after = written()
    assert after[: len(before)] == before
    steps = [(one["source"], one["block"], one["arm"]) for one in map(json.loads, after)]
    assert len(steps) == len(set(steps)) == 24
    assert code == 0, err


def test_in_sequential_mode_a_loss_ends_the_run_as_soon_as_it_is_shown(
    folder: Path, stack: Stack
) -> None:
    rail = "- {suite: facts, metric: correct, test: paired_ni, margin: 5%}"
    with spoiled(stack, "--wrong", "0.5", "--slow", "0") as url:
        file = hypothesis(
            folder, "sequential", f'url: "{stack.gateway.url}"', f'url: "{url}"', rail,
            design=f"{QUIET}, block_items: 10", pairs=480, stats="mode: sequential",
        )  # fmt: skip
        code, out, err = gate(file, "--json")
    found = json.loads(out)
    assert (code, found["decision"]) == (1, "fail"), err
    assert "stopped early: guardrail 1 facts correct paired_ni is known to fail" in err
    assert found["findings"][0]["pairs"] < 200


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("suite: facts", "suite: fcats",
         "there is no suite 'fcats'; looked in {folder}, {folder}/suites"),
        ("suite: facts", "suite: fcats", "did you mean 'facts'?"),
        ("suite: facts", "replay: facts", "is in none of the formats"),
        ("metric: lost", "metric: ttft.p95", "ttft.p95 cannot be shown by rate_max; use ratio_ni"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_with_its_place(
    folder: Path, old: str, new: str, said: str
) -> None:
    file = hypothesis(folder, "wrong", f'url: "{NOBODY}"', 'url: "http://127.0.0.1:10"')
    file.write_text(file.read_text().replace(old, new))
    code, _, err = gate(file)
    assert code == 2
    assert err.startswith(f"{file}:9:"), err
    assert said.format(folder=folder) in err


def test_ctrl_c_ends_a_run_that_goes_on_later(folder: Path, stack: Stack) -> None:
    url = f'url: "{stack.gateway.url}"'
    file = hypothesis(folder, "broken-off", url, f"{url}, model: pocket")
    process = subprocess.Popen(
        [sys.executable, "-m", "headgate", "gate", "run", str(file)],
        cwd=ROOT, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    runs = folder / ".headgate" / "runs"
    until(lambda: bool(list(runs.glob("broken-off-*/arms.json"))), START_S, lambda: "not begun")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on with it" in err
    assert time.monotonic() - began < 30
