"""inspect_ai and lm_eval, as their users run them, against the real stack: `make clients`.

Their tasks are drawn from pocket's held-out rows; no network is needed once they are installed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pocket.tasks import rows
from tests.end_to_end.stack import ROOT, Stack, assert_idle

BIN = os.environ.get("HEADGATE_CLIENTS", "")
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(
        not BIN, reason="heavy clients in an environment of their own: run `make clients`"
    ),
]
ROWS = 8
LIMIT_S = 300
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

INSPECT_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def answer():
    fields = FieldSpec(input="question", target="answer")
    return Task(json_dataset("rows.jsonl", fields), solver=generate(), scorer=includes())
"""
INSPECT_TOOL_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

@tool
def track_parcel():
    async def execute(parcel: str) -> str:
        \'\'\'Track a parcel

        Args:
            parcel: Its number
        \'\'\'
        return f"Parcel {parcel} is in Benolvar."
    return execute

@task
def track():
    questions = ["Track parcel 4659-1394.", "Where is parcel 2208-5177 now?"]
    samples = [Sample(input=one) for one in questions]
    return Task(samples, solver=[use_tools(track_parcel()), generate()], message_limit=8)
"""
LM_EVAL_CHAT = """
task: headgate_answer
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 40, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
LM_EVAL_CHOICE = """
task: headgate_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows and tasks for both tools; the first choice of a row is its answer."""
    drawn = list(rows("answer", "test", 0, ROWS))
    lines = [
        {
            "question": row.messages[-1]["content"],
            "answer": row.answer,
            "choices": [f" {row.answer}", f" {other.answer}", " I do not know."],
        }
        for row, other in zip(drawn, drawn[1:] + drawn[:1], strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "answer.py").write_text(INSPECT_TASK)
    for name, text in (("chat", LM_EVAL_CHAT), ("choice", LM_EVAL_CHOICE)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    return tmp_path


def run(folder: Path, command: str, *arguments: str, **environ: str) -> str:
    done = subprocess.run(
        [str(Path(BIN) / command), *arguments],
        cwd=folder,
        env=os.environ | OFFLINE | {"HF_HOME": str(folder / "hf")} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_inspect_ai_evaluates_a_chat(stack: Stack, folder: Path, stream: bool) -> None:
    """Every sample is answered, with usage, in both modes; nothing had to be sent twice."""
    run(
        folder, "inspect", "eval", "answer.py", "--model", "openai-api/headgate/pocket",
        "--temperature", "0", "--seed", "1", "--max-tokens", "40", "--display", "plain",
        "--log-format", "json", "--log-dir", "logs", *(("-M", "stream=true") if stream else ()),
        HEADGATE_API_KEY="x", HEADGATE_BASE_URL=f"{stack.gateway.url}/v1",
    )  # fmt: skip
    (log,) = (folder / "logs").glob("*.json")
    result = json.loads(log.read_text())
    assert result["status"] == "success"
    assert result["results"]["completed_samples"] == ROWS
    for sample in result["samples"]:
        output = sample["output"]
        assert output["choices"][0]["stop_reason"] in ("stop", "max_tokens")
        assert output["usage"]["output_tokens"] > 0
    print("accuracy", result["results"]["scores"][0]["metrics"]["accuracy"]["value"])
    assert_idle(stack.worker)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_inspect_ai_runs_a_tool_that_the_model_calls(
    stack: Stack, folder: Path, stream: bool
) -> None:
    """The call is understood, the tool runs, its result goes back, and the talk goes on."""
    (folder / "track.py").write_text(INSPECT_TOOL_TASK)
    run(
        folder, "inspect", "eval", "track.py", "--model", "openai-api/headgate/pocket",
        "--temperature", "0", "--seed", "1", "--max-tokens", "80", "--display", "plain",
        "--log-format", "json", "--log-dir", "tools", *(("-M", "stream=true") if stream else ()),
        HEADGATE_API_KEY="x", HEADGATE_BASE_URL=f"{stack.gateway.url}/v1",
    )  # fmt: skip
    (log,) = (folder / "tools").glob("*.json")
    result = json.loads(log.read_text())
    assert result["status"] == "success"
    for sample in result["samples"]:
        messages = sample["messages"]
        called = [call for one in messages for call in one.get("tool_calls") or ()]
        results = [one for one in messages if one["role"] == "tool"]
        assert called
        assert called[0]["function"] == "track_parcel"
        assert called[0]["arguments"]["parcel"] in sample["input"]
        assert "Benolvar" in results[0]["content"]
    assert_idle(stack.worker)


def lm_eval(folder: Path, task: str, model: str, *more: str) -> tuple[dict[str, Any], list[Any]]:
    """Results and samples of one task."""
    run(
        folder, "lm_eval", "run", *more, "--tasks", task, "--include_path", str(folder),
        "--model", model, "--log_samples", "--output_path", "out", OPENAI_API_KEY="x",
    )  # fmt: skip
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == ROWS
    return json.loads(results.read_text())["results"][task], lines


def test_lm_eval_generates_through_chat(stack: Stack, folder: Path) -> None:
    """`local-chat-completions`: no tokenizer, several requests at once."""
    url = f"{stack.gateway.url}/v1/chat/completions"
    settings = f"model=pocket,base_url={url},num_concurrent=4,tokenized_requests=False"
    result, samples = lm_eval(
        folder, "headgate_answer", "local-chat-completions",
        "--model_args", settings, "--apply_chat_template",
    )  # fmt: skip
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples)
    print("exact match", result["exact_match,none"])


def test_lm_eval_scores_choices_by_their_loglikelihood(stack: Stack, folder: Path) -> None:
    """`local-completions`: token ids, `echo`, `logprobs`; its sums are those that we ask for."""
    url = f"{stack.gateway.url}/v1/completions"
    tokenizer = ROOT / "pocket" / "target"
    settings = f"model=pocket,base_url={url},tokenizer_backend=huggingface,tokenizer={tokenizer}"
    result, samples = lm_eval(
        folder, "headgate_choice", "local-completions", "--model_args", settings
    )
    for sample in samples:
        for (context, choice), resp in zip(
            (tuple(sample["arguments"][key].values()) for key in sorted(sample["arguments"])),
            sample["resps"],
            strict=True,
        ):
            found = float(resp[0][0])
            assert math.isfinite(found)
            assert found == pytest.approx(own_loglikelihood(stack, context, choice), abs=0.05)
    print("accuracy", result["acc,none"])


def own_loglikelihood(stack: Stack, context: str, choice: str) -> float:
    """The same sum from one request of our own: tokens that begin within the choice."""
    answer = stack.ask(
        "/v1/completions", prompt=context + choice, echo=True, logprobs=0, max_tokens=0
    )
    logprobs = answer["choices"][0]["logprobs"]
    pairs = zip(logprobs["text_offset"], logprobs["token_logprobs"], strict=True)
    return float(sum(value for offset, value in pairs if offset >= len(context)))
