"""Arms that never ran: hypotheses and observations by numbers, for the tests of the gate."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from evals.controls import Facts
from evals.gate import judge
from evals.pairs import AA, BASELINE, CANDIDATE, SABOTAGE
from evals.verdict import Side, Verdict
from policies.hypothesis import Hypothesis
from telemetry import Observation

SUITE, REPLAY = "suite:qa", "replay:week"
CORRECT = {"suite": "qa", "metric": "correct", "test": "paired_ni", "margin": 0.05}
TTFT = {"replay": "week", "metric": "ttft.p50", "test": "ratio_ni", "margin": "10%"}
FASTER = {"replay": "week", "metric": "tpot.p50", "direction": "lower", "min_effect": "8%"}
ITEMS_A_BLOCK = 20
BASE = Side("b" * 64, {"configuration": "b"})
OTHER = Side("c" * 64, {"configuration": "c"})
SPEC = Side("d" * 64, {"hypothesis": "d"})


def hypothesis(**changed: Any) -> Hypothesis:
    """One with a quality guardrail, a latency guardrail and a claim; parts are replaced whole."""
    whole = {
        "apiVersion": "headgate/v1",
        "kind": "Hypothesis",
        "metadata": {"name": "simulated"},
        "baseline": {"config": "base.yaml"},
        "candidate": {"patch": {"runtime.weights": "w8a8"}},
        "kind_of_change": "lossy_model",
        "claims": [FASTER],
        "guardrails": [CORRECT, TTFT],
    }
    return Hypothesis.model_validate({**whole, **changed})


def suite(
    arm: str,
    rows: int = 400,
    wrong: float = 0.0,
    seed: int = 1,
    *,
    a_cluster: int = 1,
    source: str = SUITE,
    scores: Mapping[str, float] | None = None,
) -> Iterator[Observation]:
    """Rows of which every tenth is wrong in every arm, and a share `wrong` of the others here."""
    draw = random.Random(f"{arm} {seed}")
    for n in range(rows):
        right = n % 10 != 0 and draw.random() >= wrong
        yield Observation(
            f"q{n:05}",
            source,
            arm,
            f"c{n // a_cluster:05}",
            block=n // ITEMS_A_BLOCK,
            at_s=float(n),
            prompt_tokens=100,
            completion_tokens=10,
            text=f"answer {n} {right}",
            finish_reason="stop",
            scores={"correct": float(right), "bad_output": 0.0, **(scores or {})},
        )


def replayed(
    arm: str, slower: float = 1.0, blocks: int = 16, seed: int = 1, tpot: float | None = None
) -> Iterator[Observation]:
    """Recorded traffic, whose times are `slower` times as long, those between tokens `tpot`."""
    draw = random.Random(f"{arm} {seed} times")
    for n in range(blocks * ITEMS_A_BLOCK):
        noise = draw.lognormvariate(0, 0.1)
        yield Observation(
            f"r{n:05}",
            REPLAY,
            arm,
            f"s{n // 2:05}",
            block=n // ITEMS_A_BLOCK,
            at_s=1000.0 + n,
            tier="interactive" if n % 4 else "batch",
            ttft_s=0.1 * slower * noise,
            tpot_s=0.01 * (tpot or slower) * noise,
            e2e_s=0.5 * slower * noise,
            ttft_target_s=0.5,
            prompt_tokens=100 + n,
            completion_tokens=10 + n % 7,
            max_tokens=64,
            finish_reason="stop",
            scores={"bad_output": 0.0},
        )


def observed(wrong: float = 0.0, slower: float = 1.0, tpot: float = 0.8) -> list[Observation]:
    """All four arms: the candidate as told, the second baseline like the first, the spoiled one
    wrong in a tenth and half as slow again.
    """
    return [
        *suite(BASELINE), *suite(CANDIDATE, wrong=wrong), *suite(AA), *suite(SABOTAGE, wrong=0.15),
        *replayed(BASELINE), *replayed(CANDIDATE, slower, tpot=tpot), *replayed(AA),
        *replayed(SABOTAGE, 1.5),
    ]  # fmt: skip


def judged(
    observations: list[Observation], asked: Hypothesis | None = None, facts: Facts | None = None
) -> Verdict:
    return judge(asked or hypothesis(), observations, (BASE, OTHER), SPEC, 1000.0, facts)


def failing(
    observations: list[Observation], arm: str, every: int, outcome: str = "error"
) -> list[Observation]:
    """With every so manieth request of an arm failed."""
    return [
        replace(one, outcome=outcome, status=500, problem="it broke", text="", scores={})
        if one.arm == arm and int(one.id[1:]) % every == 0
        else one
        for one in observations
    ]
