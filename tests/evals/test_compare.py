"""Runs of other tools, judged as pairs. The files in runs/ are what these tools wrote: two runs
each against the pocket model, parts that nobody reads taken out; inspect_ai's log is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from evals.adapters import READERS, EmptyRun, NoRun, Run
from evals.commands.compare import compare
from evals.verdict_file import read_rows, read_verdict

RUNS = Path(__file__).parent / "runs"


def read(tool: str, path: Path, cluster: str | None = None) -> Run:
    return READERS[tool](path, "baseline", cluster)


def compared(*arguments: object) -> Result:
    return CliRunner().invoke(compare, [str(one) for one in arguments])


def lm_run(folder: Path, name: str, right: Callable[[int], bool], count: int = 400) -> Path:
    """As lm-eval writes it, with as many rows as a verdict takes."""
    path = folder / name
    path.mkdir()
    template = json.loads(next(iter((RUNS / "lm-base").iterdir())).read_text().split("\n")[0])
    rows = [{**template, "doc_id": at, "exact_match": float(right(at))} for at in range(count)]
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (path / "samples_pocket_local_2026-11-26T08-40-02.485776.jsonl").write_text(text)
    return path


# ---- what each tool wrote -----------------------------------------------------------------------


def test_an_inspect_log_is_read_as_it_is_written_packed_by_zstandard() -> None:
    run = read("inspect", RUNS / "inspect-base.eval")
    assert run.name == "pocket"
    assert run.versions["inspect_ai"]
    assert len(run.observations) == 16
    assert {one.repeat for one in run.observations} == {0, 1}
    one = next(one for one in run.observations if one.id == "answer-000")
    assert one.source == "suite:pocket"
    assert one.text == "Kelbos mirror price: 671 euros."
    assert one.scores == {"correct": 1.0, "exact": 1.0, "f1": 1.0}
    assert one.completion_tokens == 12
    assert one.prompt_tokens == 79  # 64 of them cached, which the log counts beside
    assert one.e2e_s is not None


def test_an_inspect_sample_that_failed_stays() -> None:
    run = read("inspect", RUNS / "inspect-other.json")
    assert all(one.ok for one in run.observations)
    whole = json.loads((RUNS / "inspect-other.json").read_text())
    whole["samples"][0] |= {"error": {"message": "connection refused"}, "scores": None}
    whole["samples"][1] |= {"scores": {"judge": {"value": {"tone": 0.5, "facts": "C"}}}}
    path = RUNS.parent / "never-written.json"
    from evals.adapters import inspect_ai

    head, samples = inspect_ai.log_of(path, json.dumps(whole).encode())
    assert head["eval"]["task"] == "pocket"
    broken, judged = (
        inspect_ai._observation(one, "baseline", "suite:pocket", 0, None) for one in samples[:2]
    )
    assert (broken.outcome, broken.problem, broken.scores) == ("error", "connection refused", {})
    assert judged.scores == {"correct": 0.5, "judge_tone": 0.5, "judge_facts": 1.0}


def test_lm_eval_samples_are_read() -> None:
    run = read("lm-eval", RUNS / "lm-base", cluster="id")
    assert run.name == "pocket_local"
    assert len(run.observations) == 8
    assert run.observations[0].scores == {"correct": 1.0, "exact_match": 1.0}
    assert run.observations[0].cluster == "answer-000"


def test_of_several_filters_of_a_task_the_first_one_counts(tmp_path: Path) -> None:
    path = lm_run(tmp_path, "a", lambda _: True, 2)
    file = next(path.iterdir())
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    more = [{**row, "filter": "strict", "exact_match": 0.0} for row in rows]
    file.write_text("".join(json.dumps(one) + "\n" for one in [*rows, *more]))
    assert [one.scores["correct"] for one in read("lm-eval", path).observations] == [1.0, 1.0]


def test_promptfoo_results_are_read_and_paired_by_what_they_ask() -> None:
    run, other = (read("promptfoo", RUNS / f"promptfoo-{one}.json") for one in ("base", "other"))
    assert run.versions == {"promptfoo": "0.121.20"}
    assert {one.id for one in run.observations} == {one.id for one in other.observations}
    first = run.observations[0]
    assert first.id.startswith("answer-000 ")
    assert (first.prompt_tokens, first.completion_tokens, first.e2e_s) == (79, 12, 1.38)
    assert sum(one.scores["correct"] for one in run.observations) == 7


def test_promptfoo_with_several_providers_is_refused(tmp_path: Path) -> None:
    whole = json.loads((RUNS / "promptfoo-base.json").read_text())
    whole["results"]["results"][0]["provider"] = {"id": "openai:chat:other", "label": ""}
    (tmp_path / "both.json").write_text(json.dumps(whole))
    with pytest.raises(NoRun, match=r"asks several providers .*--filter-providers"):
        read("promptfoo", tmp_path / "both.json")


def test_guidellm_and_aiperf_tell_times_by_request() -> None:
    load = read("guidellm", RUNS / "guidellm-base.json")
    assert len(load.observations) == 11  # of twelve; it keeps no one that its limit cut off
    assert [one.id for one in load.observations[:2]] == ["000-000000", "000-000001"]
    profile = read("aiperf", RUNS / "aiperf-base")
    assert len(profile.observations) == 12
    for one in (*load.observations, *profile.observations):
        assert one.ok
        assert one.ttft_s is not None and one.e2e_s is not None
        assert 0 < one.ttft_s <= one.e2e_s
        assert one.tpot_s is None or one.tpot_s * ((one.completion_tokens or 0) - 1) < one.e2e_s
    assert profile.observations[0].gap_max_s is not None


# ---- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "base", "other"),
    [
        ("inspect", "inspect-base.eval", "inspect-other.json"),
        ("lm-eval", "lm-base", "lm-other"),
        ("promptfoo", "promptfoo-base.json", "promptfoo-other.json"),
        ("guidellm", "guidellm-base.json", "guidellm-other.json"),
        ("aiperf", "aiperf-base", "aiperf-other"),
    ],
)
def test_a_handful_of_rows_is_never_a_pass(tool: str, base: str, other: str) -> None:
    done = compared(RUNS / base, RUNS / other, "--from", tool)
    assert done.exit_code == 3, done.output
    assert "inconclusive" in done.output


def test_enough_equal_rows_pass_and_a_proven_loss_fails(tmp_path: Path) -> None:
    base = lm_run(tmp_path, "base", lambda at: at % 10 > 0)
    same = lm_run(tmp_path, "same", lambda at: at % 10 > 0)
    worse = lm_run(tmp_path, "worse", lambda at: at % 10 > 1)
    passed = compared(base, same, "--from", "lm-eval", "--out", tmp_path / "run")
    assert passed.exit_code == 0, passed.output
    assert read_verdict(tmp_path / "run") == read_rows(tmp_path / "run").judged()
    failed = compared(base, worse, "--from", "lm-eval", "--json")
    assert failed.exit_code == 1
    told = json.loads(failed.output)
    (finding,) = told["findings"]
    assert (finding["lost"], finding["gained"], finding["pairs"]) == (40, 0, 400)
    assert told["design"]["imported_from"] == "lm-eval"


def test_rows_that_the_candidate_lacks_are_lost(tmp_path: Path) -> None:
    base = lm_run(tmp_path, "base", lambda _: True)
    part = lm_run(tmp_path, "part", lambda _: True, 380)
    done = compared(base, part, "--from", "lm-eval", "--json")
    assert done.exit_code == 1
    assert json.loads(done.output)["findings"][0]["lost"] == 20


def test_a_run_in_which_all_failed_is_invalid_and_never_a_pass(tmp_path: Path) -> None:
    """Several of these tools exit with 0 there."""
    whole = json.loads((RUNS / "promptfoo-base.json").read_text())
    for one in whole["results"]["results"]:
        one |= {"failureReason": 2, "success": False, "score": 0, "error": "ECONNREFUSED"}
    (tmp_path / "dead.json").write_text(json.dumps(whole))
    for order in (("dead.json", "base"), ("base", "dead.json")):
        paths = [tmp_path / o if o != "base" else RUNS / "promptfoo-base.json" for o in order]
        done = compared(*paths, "--from", "promptfoo")
        assert done.exit_code == 4, done.output
        assert "invalid (errors)" in done.output


def test_an_eval_that_never_ran_is_invalid(tmp_path: Path) -> None:
    whole = json.loads((RUNS / "inspect-other.json").read_text()) | {"samples": []}
    (tmp_path / "empty.json").write_text(json.dumps(whole))
    done = compared(RUNS / "inspect-base.eval", tmp_path / "empty.json", "--from", "inspect")
    assert done.exit_code == 4
    assert "has no sample" in done.output
    with pytest.raises(EmptyRun):
        read("inspect", tmp_path / "empty.json")


def test_a_load_that_ran_for_a_set_time_is_paired_as_far_as_both_ran(tmp_path: Path) -> None:
    """The slower of two answers fewer requests in a minute; those it was not asked did not fail."""
    whole = json.loads((RUNS / "guidellm-other.json").read_text())
    requests = whole["benchmarks"][0]["requests"]
    requests["successful"] = requests["successful"][:9]
    (tmp_path / "short.json").write_text(json.dumps(whole))
    done = compared(RUNS / "guidellm-base.json", tmp_path / "short.json", "--from", "guidellm",
                    "--metric", "served", "--json")  # fmt: skip
    told = json.loads(done.output)
    assert told["findings"][0]["pairs"] == 9
    assert told["findings"][0]["lost"] == 0
    assert told["design"]["left_out"] == 2


def test_a_hypothesis_says_what_is_asked_and_of_what(tmp_path: Path) -> None:
    text = (
        "apiVersion: headgate/v1\nkind: Hypothesis\nmetadata: {name: mine}\n"
        "baseline: {config: a.yaml}\ncandidate: {patch: {runtime.kv: int8}}\n"
        "kind_of_change: lossy_model\n"
        "guardrails: [{suite: NAME, metric: lost, test: rate_max, max: 0.02}]\n"
    )
    base = lm_run(tmp_path, "base", lambda _: True)
    same = lm_run(tmp_path, "same", lambda _: True)
    file = tmp_path / "h.yaml"
    file.write_text(text.replace("NAME", "pocket_local"))
    done = compared(base, same, "--from", "lm-eval", "--hypothesis", file, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["findings"][0]["test"] == "rate_max"
    file.write_text(text.replace("NAME", "other"))
    done = compared(base, same, "--from", "lm-eval", "--hypothesis", file)
    assert done.exit_code == 2
    assert "asks of suite:other, and the runs have suite:pocket_local" in done.output


@pytest.mark.parametrize(
    ("tool", "name", "content", "told"),
    [
        ("inspect", "a.json", "{}", "is no log of inspect_ai"),
        ("inspect", "a.json", '{"eval":\n[}', "a.json:2  is not JSON"),
        ("inspect", "a.eval", "PK not a zip", "cannot be unpacked"),
        ("lm-eval", "samples_a.jsonl", '{"a": 1}\n', "samples_a.jsonl:1  is no sample of lm-eval"),
        ("promptfoo", "a.json", "{}", "is no file of promptfoo"),
        ("promptfoo", "a.jsonl", "{}\n{", "a.jsonl:1  is no result of promptfoo"),
        ("guidellm", "a.json", "[]", "expected a JSON object"),
        ("guidellm", "a.json", "{}", "is no report of guidellm"),
        ("aiperf", "profile_export.jsonl", '{"a": 1}', "is no record of aiperf"),
    ],
)
def test_files_that_the_tool_did_not_write_are_refused(
    tmp_path: Path, tool: str, name: str, content: Any, told: str
) -> None:
    (tmp_path / name).write_text(content)
    done = compared(tmp_path / name, tmp_path / name, "--from", tool)
    assert done.exit_code == 2
    assert told in done.output


def test_wrong_usage_is_refused_with_what_was_meant(tmp_path: Path) -> None:
    base = RUNS / "lm-base"
    assert "no such file or folder" in compared(base, tmp_path / "no", "--from", "lm-eval").output
    assert "is given twice" in compared(base, base, "--from", "lm-eval").output
    negative = compared(base, RUNS / "lm-other", "--from", "lm-eval", "--margin", "-1%")
    assert negative.exit_code == 2
    assert negative.output == "--margin: expected a share such as 0.02 or 2%, got '-1%'\n"
    unknown = compared(base, RUNS / "lm-other", "--from", "lm-eval", "--metric", "ttft.p9x")
    assert unknown.exit_code == 2
    shutil.copytree(base, tmp_path / "copy")
    done = compared(tmp_path / "copy", base, "--from", "lm_eval")
    assert done.exit_code == 2
