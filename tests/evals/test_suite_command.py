"""A task of inspect_ai as a suite: with the tool itself where it is, and one that talks like it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evals.adapters.inspect_scorers import Theirs, theirs
from evals.commands.suite import suite
from evals.dataset import load_suite
from evals.item import Item
from evals.scorers.text import regex
from policies.suite import Scorer
from telemetry import Observation

# Runs no eval: asks the server for two samples as a task would, and writes the log of it.
PROGRAM = """#!{python}
import json, os, sys, urllib.request
words = sys.argv[1:]
after = lambda name, default: words[words.index(name) + 1] if name in words else default
extra = os.environ.get("FAKE", "")

def ask(text):
    body = {{"model": "any", "messages": [{{"role": "user", "content": text}}], "max_tokens": 9}}
    if extra == "tools":
        body["tools"] = [{{"type": "function", "function": {{"name": "f"}}}}]
    address = os.environ["HEADGATE_BASE_URL"] + "/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode())
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]

samples = []
for name, target in (("a", "42"), ("b", "7")):
    for epoch in range(int(after("--epochs", "1"))):
        said = ask(f"What is {{name}}?")
        if extra == "twice":
            ask(said)
        right = target in said if extra != "odd" else False
        samples.append({{
            "id": name, "epoch": epoch + 1, "target": target, "metadata": {{"doc": "d" + name}},
            "output": {{"choices": [{{"message": {{"content": said}}}}]}},
            "scores": {{"includes": {{"value": "C" if right else "I"}}}},
        }})
log = {{"status": "error" if extra == "broken" else "success", "error": {{"message": "no module"}},
       "eval": {{"task": "Facts", "packages": {{"inspect_ai": "0.3"}}, "config": {{"epochs": 3}},
                "scorers": [{{"name": "includes", "options": {{}}}}, {{"name": "own"}}]}},
       "samples": samples}}
with open(os.path.join(after("--log-dir", "."), "log.json"), "w") as file:
    json.dump(log, file)
"""


def run(folder: Path, *more: str, fake: str = "") -> Any:
    program = folder / "inspect"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    given = ["facts.py", "--from", "inspect", "--inspect", str(program), "--out", str(folder)]
    return CliRunner(env={"FAKE": fake}).invoke(suite, [*given, *more])


def test_a_task_becomes_a_suite(tmp_path: Path) -> None:
    """With what it asks, what is right, its documents, and the scorers that judge alike."""
    ended = run(tmp_path, "--cluster", "doc")
    assert ended.exit_code == 0, ended.output
    assert "includes: regex, which agreed in all of 26 answers" in ended.output
    assert "own: left out" in ended.output
    taken = load_suite(tmp_path / "facts.yaml")
    first = taken.items[0]
    assert (first.id, first.cluster, first.expected, first.body["max_tokens"]) == (
        "a",
        "da",
        "42",
        9,
    )
    assert first.body["messages"] == [{"role": "user", "content": "What is a?"}]
    assert [one.called for one in taken.scorers] == ["includes", "bad_output"]
    assert run(tmp_path).exit_code == 2
    assert run(tmp_path, "--replace").exit_code == 0


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        ("twice", "asks a model 4 times for 2 samples"),
        ("tools", "sample a has tools"),
        ("broken", "could not run the task: no module"),
        ("odd", "differs in"),
    ],
)
def test_what_would_not_be_the_same_is_refused(tmp_path: Path, fake: str, said: str) -> None:
    """Nothing is written, and it is said what to do instead."""
    ended = run(tmp_path, fake=fake)
    assert ended.exit_code == 2
    assert said in ended.output
    assert not (tmp_path / "facts.yaml").exists()


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    """Before anything runs."""
    ended = CliRunner().invoke(suite, ["t.py", "--from", "inspect", "--inspect", "no-such-thing"])
    assert ended.exit_code == 2
    assert "activate the environment" in ended.output


@pytest.mark.parametrize(
    ("options", "target", "right", "wrong"),
    [
        ({"numeric": True}, "1,234", ["1234", "It is $1,234."], ["1234 or 7", "x1234"]),
        ({"numeric": True}, "$3.50", ["3.5", "The answer is $3.50."], ["3.55", "35"]),
        ({"numeric": True}, "-7", ["-7", "so \u22127"], ["7", "2-7"]),
        ({"numeric": True, "location": "begin"}, "4", ["4 and 5", "Well, 4, 5"], ["5 and 4"]),
        ({}, "Paris", ["PARIS.", "In Paris"], ["Paris it is"]),
        ({"location": "exact", "ignore_case": False}, "a.b", [" a.b! "], ["A.b", "axb"]),
        ({"location": "any"}, "b", ["abc"], ["xyz"]),
    ],
)  # fmt: skip
def test_match_is_searched_as_inspect_does(
    options: dict[str, Any], target: str, right: list[str], wrong: list[str]
) -> None:
    """As inspect_ai 0.3.285 judges these answers."""
    (scorer,) = theirs([{"name": "inspect_ai/match", "options": options}])
    meta = scorer.row_fields([target])
    item = Item("i", "i", 0, {}, target, meta=meta)
    ours = Scorer(**scorer.ours)
    for text in (*right, *wrong):
        seen = Observation("i", "suite:s", "baseline", "i", text=text)
        assert regex(ours, item, seen) == (text in right), text


def test_two_scorers_of_a_kind_keep_apart() -> None:
    """By the names that a log's samples give them."""
    found = theirs([{"name": "match"}, {"name": "match", "options": {"numeric": True}}])
    assert [(one.name, one.metric) for one in found] == [("match", "match"), ("match1", "match1")]
    assert Theirs("x/own", "own", {}, "own").ours == {}


INSPECT = shutil.which("inspect") or shutil.which(
    "inspect", path=Path.home() / ".cache/headgate/peers/evalkit/bin"
)


@pytest.mark.skipif(INSPECT is None, reason="inspect_ai is not installed")
def test_the_tool_itself_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of solvers and a numeric match, in the installation that is here."""
    task = tmp_path / "tasks.py"
    task.write_text(
        "from inspect_ai import Task, task\n"
        "from inspect_ai.dataset import Sample\n"
        "from inspect_ai.scorer import match\n"
        "from inspect_ai.solver import generate, prompt_template, system_message\n\n"
        "@task\ndef sums():\n"
        "    rows = [Sample(id=n, input=f'{n} plus {n}?', target=str(2 * n)) for n in (3, 5)]\n"
        "    solver = [system_message('Be brief.'), prompt_template('Q: {prompt}'), generate()]\n"
        "    return Task(dataset=rows, solver=solver, scorer=match(numeric=True))\n"
    )
    monkeypatch.chdir(tmp_path)  # inspect takes no path from elsewhere
    given = [task.name, "--from", "inspect", "--inspect", str(INSPECT)]
    ended = CliRunner().invoke(suite, given)
    assert ended.exit_code == 0, ended.output
    taken = load_suite(tmp_path / "sums.yaml")
    assert [one["content"] for one in taken.items[0].body["messages"]] == [
        "Be brief.",
        "Q: 3 plus 3?",
    ]
