"""A model folder, a policy, suites, a replay and hypotheses on them, with verdicts as gates write.

No torch and no weights worth the name: what is bound is bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.binding import sides
from policies.enabling import Gated, gated
from policies.ledger import Decision, Ledger
from policies.load import load, load_hypothesis

DEVICES: Mapping[str, Mapping[str, Any]] = {
    name: {"type": "cpu", "name": "Test CPU", "detail": "AVX2", "torch": "1"}
    for name in ("auto", "cpu")
}
NOW = 1_700_000_000.0
DAY = 86400.0
POLICY = "version: 1\nruntime: {model: tiny, threads: 1}\n"
SUITE = """\
apiVersion: headgate/v1
kind: Suite
name: NAME
data: NAME.jsonl
scorers: [{kind: exact, field: answer}, {kind: judge, model: big}]
"""
GUARDRAILS = {
    "suite-a": ("suite: a", "correct", "paired_ni"),
    "suite-b": ("suite: b", "correct", "paired_ni"),
    "speed": ("replay: week", "ttft.p95", "ratio_ni"),
    "targets": ("replay: week", "slo_attained", "paired_ni"),
}
HYPOTHESIS = """\
apiVersion: headgate/v1
kind: Hypothesis
metadata: {{name: {name}}}
baseline: {{config: policy.yaml}}
candidate: {{patch: {patch}}}
kind_of_change: {kind}
guardrails: [{{{source}, metric: {metric}, test: {test}, margin: 0.02}}]
"""


def verdict_on(
    file: Path, decision: str = "pass", at: float = NOW, devices: Any = DEVICES
) -> dict[str, Any]:
    """As a gate would write it of the hypothesis in a file."""
    hypothesis = load_hypothesis(file)
    found = sides(file, hypothesis, lambda: devices)
    return {
        "hypothesis": hypothesis.name,
        "decision": decision,
        "reason": "",
        "made_at": at,
        "expires_at": at + 30 * DAY,
        "findings": [
            {
                "name": f"guardrail {index} {one.source} {one.metric}",
                "kind": "guardrail",
                "source": one.source,
                "metric": one.metric,
            }
            for index, one in enumerate(hypothesis.guardrails)
        ],
    } | {
        side: {"root": one.root, "leaves": dict(one.leaves)}
        for side, one in zip(("baseline", "candidate", "spec"), found, strict=True)
    }


@dataclass(frozen=True)
class World:
    folder: Path

    @property
    def policy(self) -> Path:
        return self.folder / "policy.yaml"

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.folder / ".headgate" / "ledger")

    def hypothesis(
        self,
        name: str,
        patch: str = "{runtime.weights: w8a8}",
        kind: str = "lossy_model",
        guardrail: tuple[str, str, str] = GUARDRAILS["suite-a"],
    ) -> Path:
        source, metric, test = guardrail
        file = self.folder / f"{name}.yaml"
        file.write_text(
            HYPOTHESIS.format(
                name=name, patch=patch, kind=kind, source=source, metric=metric, test=test
            )
        )
        return file

    def serve(self, *names: str, gate: str = "", text: str = POLICY) -> None:
        """The policy file, with these hypotheses as its optimizations."""
        listed = "".join(f"- hypothesis: {name}.yaml\n" for name in names)
        self.policy.write_text(
            text + f"optimizations:\n{listed}" + (f"gate: {gate}\n" if gate else "")
        )

    def judge(
        self, name: str, decision: str = "pass", at: float = NOW, devices: Any = DEVICES
    ) -> Decision:
        """A verdict on a hypothesis as its files are at this moment."""
        file = self.folder / f"{name}.yaml"
        return self.ledger.record_verdict(verdict_on(file, decision, at, devices))

    def gated(
        self,
        now: float = NOW + 1,
        devices: Callable[[], Any] = lambda: DEVICES,
        serving: Gated | None = None,
    ) -> Gated:
        return gated(self.policy, load(self.policy), now, devices, serving)

    def states(self, **how: Any) -> dict[str, str]:
        return {one.hypothesis: one.state for one in self.gated(**how).standings}


def build(folder: Path) -> World:
    model = folder / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"\0" * 64)
    (model / "tokenizer.json").write_text('{"model": {}}')
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    for name in ("a", "b"):
        (folder / f"{name}.yaml").write_text(SUITE.replace("NAME", name))
        (folder / f"{name}.jsonl").write_text('{"id": "1", "prompt": "hi", "expected": "ho"}\n')
    (folder / "week.jsonl").write_text('{"t_s": 0, "prompt": "hi"}\n')
    (folder / "policy.yaml").write_text(POLICY)
    return World(folder)
