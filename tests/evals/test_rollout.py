"""The controller against a gateway that listens: by steps to all users, and back at once."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.metrics import metric
from evals.monitor import Monitor, Signal
from evals.rollout import Plan, Progress, Rollout
from evals.steering import Candidate, Steered
from evals.traces import read_trace
from policies.ledger import Ledger
from tests.gateway.test_variants import broken, hi
from tests.gateway.world import HELLO, Fake, Front, Peer, gateway, on_loop, until, upstream

ROOTS = {"baseline": "b" * 64, "candidate": "c" * 64, "spec": "d" * 64}
SERVED = Signal("served", metric("served"), 0.1)


@dataclass
class World:
    """A gateway with traffic, a candidate, and what a controller needs."""

    folder: Path
    front: Front
    new: Fake
    said: list[str] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)
    stands: str | None = None

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.folder / "ledger")

    def rollout(self, steered: Steered, **more: Any) -> Rollout:
        """A controller; another one of the same folder goes on."""
        file = self.folder / "progress.json"
        progress = Progress.load(file) or Progress("r1")
        candidate = Candidate(progress.id, "h", {}, [{"url": self.new.url}], (), ROOTS)
        plan = Plan(candidate, 20, (0.3, 0.6), 0.0, "e1")

        async def pause(_seconds: float) -> None:
            await asyncio.sleep(0.02)

        return Rollout(
            plan, steered, Monitor([SERVED], 0.05), progress, file, self.ledger,
            lambda _now: self.stands, self.folder / "incidents", self.said.append, pause=pause,
            **more,
        )  # fmt: skip


@asynccontextmanager
async def world(
    folder: Path, answer: Callable[[Peer], Any] = hi, **policy: Any
) -> AsyncIterator[World]:
    """Eight clients ask all the time, each request in a session of its own."""
    async with upstream(hi) as old, upstream(answer) as new, gateway(old, **policy) as front:
        it = World(folder, front, new)

        async def client(name: int) -> None:
            for at in range(10**6):
                headers = {"x-session-id": f"{name} {at}"}
                it.statuses.add((await front.post(HELLO, headers=headers)).status_code)

        clients = [asyncio.create_task(client(name)) for name in range(8)]
        try:
            yield it
        finally:
            for one in clients:
                one.cancel()
            await asyncio.gather(*clients, return_exceptions=True)


@on_loop
async def test_a_good_candidate_is_promoted_step_by_step(tmp_path: Path) -> None:
    """Each step is in the ledger; no client sees anything but answers."""
    async with world(tmp_path) as it, Steered(it.front.url) as steered:
        assert await it.rollout(steered).run() == "promoted"
        assert [one.decision for one in it.ledger.read().decisions] == [
            "shadow", "0.3 of sessions", "0.6 of sessions", "promoted",
        ]  # fmt: skip
        assert it.statuses == {200}
        assert (await it.front.client.get("/admin/variants")).json() == {"candidate": None}


@on_loop
async def test_one_that_degrades_after_200_requests_is_rolled_back_by_itself(
    tmp_path: Path,
) -> None:
    """Under load, without a failed request; it is quarantined, and the incident can be replayed,
    with its text."""
    asked = 0

    async def degrading(peer: Peer) -> None:
        nonlocal asked
        asked += 1
        await (hi if asked <= 200 else broken)(peer)

    record = {"consent": "given", "path": str(tmp_path / "recorded")}
    async with (
        world(tmp_path, degrading, record=record) as it,
        Steered(it.front.url) as steered,
    ):
        rollout = it.rollout(steered)
        rollout.plan = Plan(rollout.plan.candidate, 20, (0.3, 0.6), 3600.0, "e1")
        assert await rollout.run() == "rolled back"
        assert it.statuses == {200}
        last = it.ledger.read().decisions[-1]
        assert (last.kind, last.candidate, last.evidence) == (
            "quarantine",
            ROOTS["candidate"],
            "e1",
        )
        # 503: the candidate's circuit was open by then
        assert re.search("failed: (error 50[23](, )?)+$", last.reason)
        folder = tmp_path / "incidents" / last.detail["incident"]
        told = json.loads((folder / "incident.json").read_text())
        assert told["worst"][0]["candidate"]["outcome"] == "error"
        assert len(read_trace(folder / "replay.jsonl").rows) > 50
        recorded = read_trace(folder / "recorded.jsonl").rows
        assert len(recorded) == told["recorded"]["requests"] > 50
        assert all(row.body == HELLO for row in recorded)
        arms = re.findall('"headgate.arm":"([a-z]+)"', (folder / "recorded.jsonl").read_text())
        assert {"baseline", "candidate"} == set(arms)
        before = len(it.new.requests)
        await it.front.post(HELLO)
        assert len(it.new.requests) == before


@on_loop
async def test_a_killed_controller_leaves_the_baseline_and_goes_on_when_it_is_back(
    tmp_path: Path,
) -> None:
    """At the second step, with what it had proved by then, and with a candidate's worker that has
    another address."""
    async with (
        world(tmp_path) as it,
        Steered(it.front.url) as steered,
        upstream(hi) as another,
    ):
        first = it.rollout(steered)
        first.plan = Plan(first.plan.candidate, 20, (0.3, 0.6), 3600.0)
        task = asyncio.create_task(first.run())
        await until(lambda: first.progress.stage == 1 and first.monitor.passed)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        variant: Any = it.front.live.beside
        variant.orders = variant.orders.rolled_back("", 0.0)  # as when the lease is over
        died, it.new = it.new, another
        asked = len(died.requests)
        second = it.rollout(steered)
        assert (second.progress.stage, second.progress.id) == (1, "r1")
        assert await second.run() == "promoted"
        assert len(another.requests) > 0
        assert len(died.requests) <= asked + 8  # what was under way
        assert it.said.count("shadow: 0 shadow pairs, 0 of 1 signals proved") == 1
        assert it.statuses == {200}


@on_loop
async def test_a_verdict_that_stands_no_longer_ends_it_without_blame(tmp_path: Path) -> None:
    """Nothing is renewed, and nobody is quarantined for it."""
    async with world(tmp_path) as it, Steered(it.front.url) as steered:
        rollout = it.rollout(steered)
        rollout.plan = Plan(rollout.plan.candidate, 20, (0.3,), 3600.0)
        task = asyncio.create_task(rollout.run())
        await until(lambda: rollout.progress.stage == 1)
        it.stands = "its pass has expired"
        assert await task == "stopped"
        assert {one.kind for one in it.ledger.read().decisions} == {"rollout"}
        before = len(it.new.requests)
        await it.front.post(HELLO)
        assert len(it.new.requests) == before


@on_loop
async def test_a_shadow_that_fails_never_reaches_a_user(tmp_path: Path) -> None:
    async with world(tmp_path, broken) as it, Steered(it.front.url) as steered:
        assert await it.rollout(steered).run() == "rolled back"
        assert it.ledger.read().decisions[0].decision == "shadow"
        assert it.ledger.read().decisions[-1].detail["stage"] == "shadow"
        assert it.statuses == {200}


@on_loop
async def test_a_gateway_that_is_away_is_waited_for(tmp_path: Path) -> None:
    """Its lease runs out meanwhile; back with nothing known of the candidate, it is told anew."""
    async with world(tmp_path) as it, Steered(it.front.url) as steered:
        rollout = it.rollout(steered)
        steered.url = "http://127.0.0.1:9"
        task = asyncio.create_task(rollout.run())
        await until(lambda: any("does not answer" in one for one in it.said))
        steered.url = it.front.url
        assert await task == "promoted"


@on_loop
async def test_a_paused_rollout_stays_at_its_stage_until_it_is_resumed(tmp_path: Path) -> None:
    """However much is proved meanwhile; the gateway is told where it stays."""
    async with world(tmp_path) as it, Steered(it.front.url) as steered:
        client, path = it.front.client, "/admin/variants/candidate"
        rollout = it.rollout(steered)
        rollout.plan = Plan(rollout.plan.candidate, 20, (0.3, 0.6), 0.5, "e1")
        task = asyncio.create_task(rollout.run())
        await until(lambda: rollout.progress.stage == 1)
        assert (await client.post(f"{path}/pause", json={"id": "r1"})).status_code == 200
        await until(lambda: any(one.startswith("paused at") for one in it.said))
        stage, pairs = rollout.progress.stage, rollout.monitor.watched[0].safe.count
        await until(lambda: rollout.monitor.passed)
        await until(lambda: rollout.monitor.watched[0].safe.count > pairs + 20)
        await until(lambda: rollout.clock() - rollout.progress.began_at > 0.6)
        assert rollout.progress.stage == stage
        told = (await client.get("/admin/variants")).json()["candidate"]
        assert (told["stage"]["at"], told["stage"]["steps"]) == (stage, [0.3, 0.6])
        assert told["stage"]["signals"][0]["signal"] == "served"
        assert (await client.post(f"{path}/resume", json={"id": "r1"})).status_code == 200
        assert await task == "promoted"
