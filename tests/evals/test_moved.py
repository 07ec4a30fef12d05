"""Traffic that moves away from what was judged makes a verdict stale."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.moved import compare
from evals.rows import Row
from tests.policies.gated_world import GUARDRAILS, NOW, World, build

ROOT = Path(__file__).parents[2]


def traffic(seed: int, **change: Callable[[int], Any]) -> list[Row]:
    """400 requests of two desks in two tiers, prompts of 50 to 500 characters."""
    rng = random.Random(seed)
    rows = []
    for number in range(400):
        desk = rng.choice("ab")
        said = {
            "system": f"You serve desk {desk}.",
            "text": "x" * rng.randint(50, 500),
            "tier": rng.choice(("interactive", "batch")),
            "tenant": rng.choice(("one", "two", "three")),
            "turn": rng.randint(0, 3),
        } | {name: make(number) for name, make in change.items()}
        body = {
            "messages": [
                {"role": "system", "content": said["system"]},
                {"role": "user", "content": said["text"]},
            ]
        }
        meta = {"tenant": said["tenant"]}
        rows.append(Row(float(number), body, tier=said["tier"], turn=said["turn"], meta=meta))
    return rows


def test_another_day_of_the_same_traffic_stays() -> None:
    """Fifty pairs of days: chance alone is never taken for a move."""
    assert all(compare(traffic(2 * day), traffic(2 * day + 1)).stays for day in range(50))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("prompt length", {"text": lambda at: "x" * (50 + 3 * at)}),
        ("first message", {"system": lambda at: f"You serve desk {'abc'[at % 3]}."}),
        ("tier", {"tier": lambda at: "batch" if at % 10 else "interactive"}),
        ("tenant", {"tenant": lambda at: "four" if at % 2 else "one"}),
        ("turn", {"turn": lambda at: at % 8}),
    ],
)
def test_what_has_moved_is_named(what: str, change: dict[str, Callable[[int], Any]]) -> None:
    found = compare(traffic(1), traffic(2, **change))
    assert not found.stays
    assert found.furthest[0] == what


def test_too_few_requests_say_nothing() -> None:
    with pytest.raises(ValueError, match="400 requests were judged and 99 are recorded"):
        compare(traffic(1), traffic(2)[:99])


def write(file: Path, texts: Callable[[int], str]) -> None:
    lines = [
        {"t_s": float(at), "body": {"messages": [{"role": "user", "content": texts(at)}]}}
        for at in range(200)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def drift(world: World, traffic: Path) -> subprocess.CompletedProcess[str]:
    argv = ["-m", "headgate", "gate", "drift", str(world.folder / "speed.yaml"), str(traffic)]
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_verdict_is_stale_until_the_traffic_is_back(tmp_path: Path) -> None:
    """What the command finds stands in the ledger, and the policy obeys it."""
    world = build(tmp_path)
    write(world.folder / "week.jsonl", lambda at: "x" * (10 + at % 50))
    world.hypothesis("speed", guardrail=GUARDRAILS["speed"])
    world.judge("speed")
    world.serve("speed")
    live = world.folder / "live.jsonl"
    for text, code, state, leaves in (
        (lambda at: "x" * (300 + at), 6, "stale", ("traffic",)),
        (lambda at: "x" * (10 + at % 50), 0, "on", ()),
    ):
        write(live, text)
        done = drift(world, live)
        assert done.returncode == code, done.stderr
        (one,) = world.gated(now=NOW + 2).standings
        assert (one.state, one.leaves) == (state, leaves)
    write(live, lambda at: "x" * (300 + at))
    assert drift(world, live).returncode == 6
    file = world.folder / "speed.yaml"
    file.write_text(file.read_text() + "validity: {on_traffic_drift: warn}\n")
    (one,) = world.gated(now=NOW + 2).standings
    assert (one.state, one.enabled) == ("on", True)
    assert one.why.startswith("prompt length of live traffic has moved (PSI ")
    live.write_text("{}\n")
    assert drift(world, live).returncode == 2
