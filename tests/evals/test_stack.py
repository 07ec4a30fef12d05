"""Stacks: hypotheses on one policy are checked, run in all their arms, and set side by side."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

import headgate
from evals.arms import Arm
from evals.design import Step
from evals.journal import Done
from evals.matrix import FULL, without
from evals.pairs import BASELINE
from evals.stack import execute, order, prepare
from policies.patching import Configured
from policies.problems import PolicyError
from tests.evals.test_gate_plan import SUITE
from tests.gateway.world import DONE, Answer, Peer, on_loop, upstream

FILE = """\
apiVersion: headgate/v1
kind: Hypothesis
metadata: {{name: {name}}}
baseline: {{config: base.yaml}}
candidate: {{patch: {{{patch}}}}}
kind_of_change: lossy_model
guardrails:
- {{suite: qa, metric: correct, test: paired_ni, margin: 5%}}
design: {{warmup: 0, block_items: 8, concurrency: 4}}
"""


def written(folder: Path, *patches: str, rows: int = 48) -> list[Path]:
    """A hypothesis `a`, `b`, ... for each patch, beside the policy and suite of all."""
    (folder / "base.yaml").write_text("version: 1\nruntime: {model: pocket, threads: 1}\n")
    (folder / "qa.yaml").write_text(SUITE)
    lines = [{"id": f"q{n:03}", "prompt": f"say {n}", "expected": str(n)} for n in range(rows)]
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    files = []
    for name, patch in zip("abcdef", patches, strict=False):
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(FILE.format(name=name, patch=patch))
    return files


KV, THREADS, WEIGHTS = "runtime.kv: int8", "runtime.threads: 2", "runtime.weights: w8a8"


def test_each_arm_has_every_change_but_its_own(tmp_path: Path) -> None:
    stack = prepare(written(tmp_path, KV, THREADS, WEIGHTS))
    found = {arm: one.data["runtime"] for arm, one in stack.policies.items()}
    base = {"model": "pocket", "threads": 1}
    assert found == {
        BASELINE: base,
        FULL: {**base, "kv": "int8", "threads": 2, "weights": "w8a8"},
        without("a"): {**base, "threads": 2, "weights": "w8a8"},
        without("b"): {**base, "kv": "int8", "weights": "w8a8"},
        without("c"): {**base, "kv": "int8", "threads": 2},
    }
    assert len(stack.steps) == 5 * 6


def test_arms_take_turns_forwards_and_backwards(tmp_path: Path) -> None:
    """So that a machine that gets slower does so to all of them; the same by the same seed."""
    (source,) = prepare(written(tmp_path, KV, THREADS)).sources
    steps = order(source.blocks, ("x", "y", "z"), 7)
    assert steps == order(source.blocks, ("x", "y", "z"), 7)
    for at in range(0, len(steps), 6):
        first, second = (
            [one.arm for one in steps[at : at + 3]],
            [one.arm for one in steps[at + 3 : at + 6]],
        )
        assert sorted(first) == ["x", "y", "z"]
        assert second == first[::-1]


@pytest.mark.parametrize(
    ("patches", "said"),
    [
        ((KV, "runtime.kv: int8"), "candidate.patch.runtime.kv  a.yaml changes it as well"),
        ((KV, "runtime.kv: int3"), "b.yaml:5:"),
        ((KV, ""), "b.yaml:5:"),
    ],
)
def test_what_cannot_be_stacked_is_refused(
    tmp_path: Path, patches: tuple[str, ...], said: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        prepare(written(tmp_path, *patches))
    assert said in str(caught.value)


def test_another_baseline_or_the_same_name_is_refused(tmp_path: Path) -> None:
    first, second = written(tmp_path, KV, THREADS)
    (tmp_path / "other.yaml").write_text("version: 1\nruntime: {model: pocket, threads: 2}\n")
    text = second.read_text()
    second.write_text(text.replace("base.yaml", "other.yaml").replace("name: b", "name: a"))
    with pytest.raises(PolicyError) as caught:
        prepare([first, second])
    assert "is not that of a.yaml: a stack has one baseline" in str(caught.value)
    assert "twice in one stack: a, a" in str(caught.value)


def test_one_hypothesis_is_no_stack(tmp_path: Path) -> None:
    files = written(tmp_path, KV)
    done = CliRunner().invoke(headgate.main, ["gate", "matrix", *map(str, files)])
    assert (done.exit_code, "at least two" in done.output) == (2, True)


def answers(wrong: int) -> Answer:
    """A server that gets every `wrong`th right answer wrong; 0: none."""

    async def answer(peer: Peer) -> None:
        said = json.loads(peer.request.body)["messages"][-1]["content"].split()[-1]
        if wrong and int(said) % wrong == 0:
            said = "?"
        payload = {"choices": [{"index": 0, "delta": {"content": said}, "finish_reason": "stop"}]}
        await peer.stream(b"data: " + json.dumps(payload).encode() + b"\n\n", DONE)

    return answer


@contextlib.asynccontextmanager
async def fakes(
    policies: Mapping[str, Configured], _folder: Path
) -> AsyncIterator[Mapping[str, Arm]]:
    """Each second answer is wrong with int8 KV, whatever else there is."""
    async with contextlib.AsyncExitStack() as stack:
        arms = {}
        for name, one in policies.items():
            wrong = 2 if "kv" in one.data["runtime"] else 0
            server = await stack.enter_async_context(upstream(answers(wrong)))
            arms[name] = Arm(name, server.url, model="m")
        yield arms


@on_loop
async def test_a_stack_runs_and_is_not_run_again(tmp_path: Path) -> None:
    """The change that loses half loses it on top of the other, too; the other adds nothing. What
    the journal has is not asked again."""
    stack = prepare(written(tmp_path, KV, THREADS))
    ran: list[str] = []

    def after(step: Step, _done: Done) -> str | None:
        ran.append(step.arm)
        return "enough for now" if len(ran) == 5 else None

    await execute(stack, tmp_path / "run", fakes, after)
    journal = tmp_path / "run" / "journal.jsonl"
    before = journal.read_bytes()
    assert 5 <= before.count(b"\n") < len(stack.steps)
    found = await execute(stack, tmp_path / "run", fakes, after)
    assert journal.read_bytes().startswith(before)
    assert journal.read_bytes().count(b"\n") == len(stack.steps) == 24
    by_name = {one.of: one for one in found.marginal}
    assert by_name["a"].estimate == pytest.approx(-0.5)
    assert by_name["b"].estimate == pytest.approx(0.0)
    (total,), (left,) = found.total, found.interaction
    assert (total.estimate, left.estimate) == pytest.approx((-0.5, 0.0))
