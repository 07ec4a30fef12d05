"""What a hypothesis names is checked before anything is asked: metrics, clusters, keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.execute import prepare
from evals.sources import read_sources
from policies.load import PolicyError, load_hypothesis

SUITE = """\
apiVersion: headgate/v1
kind: Suite
name: desk
data: desk.jsonl
cluster: conversation
scorers: [{kind: exact}, {kind: bad_output}]
"""
HYPOTHESIS = """\
apiVersion: headgate/v1
kind: Hypothesis
metadata: {name: named}
baseline: {url: "http://a"}
candidate: {url: "http://b"}
kind_of_change: lossy_model
claims: [{suite: desk, metric: lost_sales, direction: lower}]
guardrails:
- {suite: desk, metric: correct, test: paired_ni, margin: 2%}
"""


def written(folder: Path, old: str = "lost_sales", new: str = "ttft.p50", **more: Any) -> Path:
    """Two conversations a desk, of three turns each; the hypothesis with one thing replaced."""
    (folder / "desk.yaml").write_text(SUITE)
    rows = [
        {"id": f"{talk}.{turn}", "conversation": f"talk {talk}", "turn": turn, "prompt": "?",
         "expected": "!", "desk": talk // 2, "shift": turn} | more
        for talk in range(6)
        for turn in range(3)
    ]  # fmt: skip
    (folder / "desk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "week.jsonl").write_text('{"t_ms": 0, "body": {"prompt": "x"}}\n')
    text = HYPOTHESIS.replace("lost_sales", "ttft.p50") if old != "lost_sales" else HYPOTHESIS
    assert old in text
    file = folder / "named.yaml"
    file.write_text(text.replace(old, new))
    return file


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("metric: correct", "metric: corect",
         "named.yaml:9:25  guardrails[0].metric  nothing in suite:desk scores 'corect'; there are "
         "bad_output, correct, exact, and times and tokens; did you mean 'correct'?"),
        ("lost_sales", "fluency",
         "named.yaml:7:32  claims[0].metric  nothing in suite:desk scores 'fluency'"),
        ("suite: desk, metric: correct", "replay: week, metric: correct",
         "nothing in replay:week scores 'correct'; there are bad_output, refusal"),
        ("margin: 2%", "margin: 2%, cluster: dsek",
         "named.yaml:9:72  guardrails[0].cluster  row '0.0' of suite:desk has no field 'dsek'; did "
         "you mean 'desk'?"),
        ("margin: 2%", "margin: 2%, cluster: shift", "takes the conversation 'talk "),
    ],
)  # fmt: skip
def test_what_no_row_can_answer_is_refused_at_its_place(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    file = written(tmp_path, old, new)
    with pytest.raises(PolicyError) as caught:
        read_sources(file, load_hypothesis(file))
    assert said in str(caught.value)


def test_a_guardrail_may_name_what_answers_depend_on_together(tmp_path: Path) -> None:
    """Talks of one desk are one cluster then, and stay conversations of their own as they are
    asked; `conversation` is what the suite says."""
    for field, clusters in (("desk", 3), ("conversation", 6)):
        file = written(tmp_path, "margin: 2%", f"margin: 2%, cluster: {field}")
        (source,) = read_sources(file, load_hypothesis(file))
        sessions = [session for block in source.blocks for session in block.sessions]
        assert (len(sessions), {len(one) for one in sessions}) == (6, {3})
        assert len({item.cluster for one in sessions for item in one}) == clusters


def test_a_key_that_the_environment_lacks_is_told_before_every_request_is_refused(
    tmp_path: Path,
) -> None:
    file = written(tmp_path, '{url: "http://a"}', '{url: "http://a", api_key_env: NO_SUCH_KEY}')
    with pytest.raises(
        PolicyError, match=r"named.yaml:4:42  baseline.api_key_env  the environment"
    ):
        prepare(file)
