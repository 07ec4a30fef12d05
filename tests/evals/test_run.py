"""A run: what is asked of whom, in which order, what is written down, and when it stops early."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from evals.arms import Arm
from evals.design import Step, blocks_of_rows, blocks_of_time, steps
from evals.item import Item
from evals.journal import Done, Journal
from evals.pairs import AA, BASELINE, CANDIDATE
from evals.questions import Unanswerable
from evals.run import Bench, Source, run
from policies.hypothesis import Hypothesis
from telemetry import Observation

SUITE, REPLAY = "suite:s", "replay:r"
MESSAGES = [{"role": "user", "content": "?"}]


@dataclass
class Server:
    """Answers `ok`, counts steps at /metrics, and notes what it was asked, and how many at once."""

    fingerprint: str = "fp_a"
    answers_until: int = 10**9  # after so many requests it answers 500
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    under_way: int = 0
    most: int = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        if len(self.asked) > self.answers_until:
            return web.json_response({"error": {"message": "broken"}}, status=500)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.002)
        self.under_way -= 1
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        chunk = {
            "system_fingerprint": self.fingerprint,
            "choices": [{"index": 0, "delta": {"content": "ok"}, "finish_reason": "stop"}],
        }
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def metrics(self, _request: web.Request) -> web.Response:
        lines = f'headgate_steps_total{{kind="a"}} {len(self.asked)}\nheadgate_up 1\n'
        lines += "# TYPE headgate_declared_total counter\n"
        return web.Response(text=lines)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/metrics", self.metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield
        await runner.cleanup()

    def arm(self, name: str, *fingerprints: str) -> Arm:
        return Arm(name, self.url, None, "m", (f"{self.url}/metrics",), fingerprints)


def hypothesis(**design: Any) -> Hypothesis:
    return Hypothesis.model_validate(
        {
            "apiVersion": "headgate/v1",
            "kind": "Hypothesis",
            "metadata": {"name": "h"},
            "baseline": {"url": "http://a"},
            "candidate": {"url": "http://b"},
            "kind_of_change": "lossy_model",
            "guardrails": [{"suite": "s", "metric": "correct", "test": "paired_ni", "margin": 0.1}],
            "design": {"block_items": 5, "sabotage_control": False, **design},
        }
    )


async def score(_item: Item, seen: Observation) -> Mapping[str, float]:
    return {"correct": float(seen.text == "ok")}


def rows(count: int, turns: int = 1) -> list[Item]:
    return [
        Item(f"{at}.{turn}", f"c{at}", turn, {"messages": MESSAGES})
        for at in range(count)
        for turn in range(turns)
    ]


def planned(asked: Hypothesis, source: Source) -> Sequence[Step]:
    return steps(source.blocks, asked.design, asked.stats)


def suite(asked: Hypothesis, items: Sequence[Item]) -> Source:
    return Source(SUITE, blocks_of_rows(SUITE, items, asked.design, asked.stats), score)


async def ran(
    asked: Hypothesis, arms: Sequence[Arm], source: Source, file: Path, stop_after: int = 10**9
) -> tuple[str, list[Done]]:
    """All of the plan; or until so many steps are written, as if somebody had said so."""
    bench = Bench(asked, {arm.name: arm for arm in arms}, {}, {source.name: source})
    names = {arm.name for arm in arms}
    todo = [step for step in planned(asked, source) if step.arm in names]
    with Journal(file) as journal:

        def after(_step: Step, _done: Done) -> str | None:
            return "enough" if len(journal.done) >= stop_after else None

        why = await run(bench, todo, journal, after)
        return why, list(journal.done)


def test_both_arms_are_asked_the_same_and_all_is_written(tmp_path: Path) -> None:
    """Every row once in each arm, each with its score and its server's fingerprint; warming up
    is asked, and not counted.
    """

    async def check() -> None:
        asked, first, second = hypothesis(aa_control=False), Server(), Server("fp_b")
        async with first.served(), second.served():
            arms = [first.arm(BASELINE, "fp_a"), second.arm(CANDIDATE, "fp_b")]
            why, done = await ran(asked, arms, suite(asked, rows(20)), tmp_path / "j")
        assert why == ""
        seen = [one for step in done for one in step.observations]
        assert Counter((one.id, one.arm) for one in seen) == Counter(
            (item.id, arm) for item in rows(20) for arm in (BASELINE, CANDIDATE)
        )
        assert all(one.scores == {"correct": 1.0} for one in seen)
        assert {one.fingerprint for one in seen if one.arm == CANDIDATE} == {"fp_b"}
        assert len(first.asked) == 20 + 5
        assert [one.at_s for one in seen] == sorted(one.at_s for one in seen)

        def said(server: Server) -> list[Any]:
            return [{**body, "cache_salt": ""} for body in server.asked]

        key = json.dumps
        assert sorted(said(first), key=key) == sorted(said(second), key=key)

    asyncio.run(check())


def test_rows_and_repeats_have_seeds_of_their_own_and_arms_share_them(tmp_path: Path) -> None:
    """Rows with one seed would all be drawn alike, repeats with one would be no repeats, also
    where a row brings a seed. The same question asked again has the same one: caches know it again.
    """

    async def check() -> None:
        asked, first, second = hypothesis(aa_control=False, repeats=3, warmup=0), Server(), Server()
        items = [
            replace(one, body={"messages": [{"role": "user", "content": asked_for}]})
            for one, asked_for in zip(rows(5), "abcda", strict=True)
        ]
        items[1] = replace(items[1], body={**items[1].body, "seed": 40})
        async with first.served(), second.served():
            arms = [first.arm(BASELINE), second.arm(CANDIDATE)]
            await ran(asked, arms, suite(asked, items), tmp_path / "j")
        seeds = [sorted(body["seed"] for body in server.asked) for server in (first, second)]
        assert seeds[0] == seeds[1]
        assert len(set(seeds[0])) == 4 * 3
        assert {40, 41, 42} < set(seeds[0])

    asyncio.run(check())


def test_arms_and_blocks_share_no_cache(tmp_path: Path) -> None:
    """Two arms may be one server: the salt of each block in each arm is its own."""

    async def check() -> None:
        asked, server = hypothesis(aa_control=False, warmup=0), Server()
        async with server.served():
            arms = [server.arm(BASELINE), server.arm(CANDIDATE)]
            await ran(asked, arms, suite(asked, rows(20)), tmp_path / "j")
        salts = Counter(body["cache_salt"] for body in server.asked)
        assert len(salts) == 2 * 4
        assert set(salts.values()) == {5}

    asyncio.run(check())


def test_what_changed_is_proven_by_counters_of_the_candidate(tmp_path: Path) -> None:
    """By how much they rose in its blocks; what warming up counted is not among it."""

    async def check() -> None:
        asked, first, second = hypothesis(aa_control=False), Server(), Server()
        async with first.served(), second.served():
            arms = [first.arm(BASELINE), second.arm(CANDIDATE)]
            _, done = await ran(asked, arms, suite(asked, rows(20)), tmp_path / "j")
        risen = sum(one.counters.get("headgate_steps_total", 0) for one in done)
        assert risen == 20
        assert all(not one.counters for one in done if one.arm == BASELINE)

    asyncio.run(check())


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_at_once_than_asked_for_and_turns_in_their_order(
    tmp_path: Path, concurrency: int
) -> None:
    async def check() -> None:
        asked = hypothesis(aa_control=False, concurrency=concurrency, block_items=12, warmup=0)
        server = Server()
        async with server.served():
            arms = [server.arm(BASELINE), server.arm(CANDIDATE)]
            _, done = await ran(asked, arms, suite(asked, rows(8, turns=3)), tmp_path / "j")
        assert server.most == concurrency
        for step in done:
            for one, other in zip(step.observations, step.observations[1:], strict=False):
                if one.cluster == other.cluster:
                    assert other.turn == one.turn + 1
                    assert one.e2e_s is not None
                    assert other.at_s >= one.at_s + one.e2e_s

    asyncio.run(check())


def test_a_run_that_ended_in_the_middle_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        asked, server = hypothesis(aa_control=False, warmup=0), Server()
        source = suite(asked, rows(40))
        async with server.served():
            arms = [server.arm(BASELINE), server.arm(CANDIDATE)]
            why, done = await ran(asked, arms, source, tmp_path / "j", stop_after=6)
            assert (why, len(done)) == ("enough", 6)
            before = len(server.asked)
            why, again = await ran(asked, arms, source, tmp_path / "j")
        assert (why, again[:6]) == ("", done)
        assert before + sum(len(one.observations) for one in again[6:]) == len(server.asked) == 80
        late = [one.at_s for step in again for one in step.observations]
        assert late == sorted(late)

    asyncio.run(check())


def test_a_foreign_answer_ends_the_run(tmp_path: Path) -> None:
    """Somebody has restarted the server with something else: what follows is not what is judged."""

    async def check() -> None:
        asked, first, second = hypothesis(aa_control=False), Server(), Server("fp_other")
        async with first.served(), second.served():
            arms = [first.arm(BASELINE, "fp_a"), second.arm(CANDIDATE, "fp_b")]
            why, done = await ran(asked, arms, suite(asked, rows(40)), tmp_path / "j")
        assert why == "the candidate arm answered as fp_other, and is fp_b"
        assert {one.arm for one in done} == {BASELINE, CANDIDATE}
        assert len(done) == 2

    asyncio.run(check())


def test_an_arm_that_dies_ends_the_run_when_its_block_has_ended(tmp_path: Path) -> None:
    """Its failures are written as failures; the other arms of that block are asked still, since
    half a block would be read as theirs.
    """

    async def check() -> None:
        asked, first, second = hypothesis(warmup=0), Server(), Server(answers_until=7)
        async with first.served(), second.served():
            arms = [first.arm(BASELINE), second.arm(CANDIDATE), first.arm(AA)]
            why, done = await ran(asked, arms, suite(asked, rows(40)), tmp_path / "j")
        assert why == "the candidate arm answered no request of a whole block: broken"
        failed = [one for step in done for one in step.observations if not one.ok]
        assert {one.arm for one in failed} == {CANDIDATE}
        assert len(failed) == 3 + 5
        assert all(one.scores == {"correct": 0.0} for one in failed)
        last = max(step.block for step in done)
        assert {step.arm for step in done if step.block == last} >= {BASELINE, CANDIDATE}

    asyncio.run(check())


def test_an_arm_that_never_came_up_is_an_arm_that_fails(tmp_path: Path) -> None:
    """Nothing is left out: its rows say why."""

    async def check() -> None:
        asked, server = hypothesis(aa_control=False), Server()
        async with server.served():
            arms = [server.arm(BASELINE), Arm(CANDIDATE, "", broken="no such model")]
            why, done = await ran(asked, arms, suite(asked, rows(40)), tmp_path / "j")
        assert why == "the candidate arm answered no request of a whole block: no such model"
        failed = [one for step in done for one in step.observations if one.arm == CANDIDATE]
        assert [(one.outcome, one.problem) for one in failed] == [("error", "no such model")] * 5

    asyncio.run(check())


def test_recorded_traffic_is_played_at_its_own_times(tmp_path: Path) -> None:
    """Each block from its own begin on; nothing waits for an answer; lateness is noted."""

    async def check() -> None:
        asked, server = hypothesis(aa_control=False, warmup=0, block=1.0, speed=10.0), Server()
        items = [
            Item(f"{at}", f"{at}", 0, {"messages": MESSAGES}, meta={"t_s": at})
            for at in (0.0, 0.5, 3.0, 3.9)
        ]
        blocks = blocks_of_time(REPLAY, items, asked.design, asked.stats)
        source = Source(REPLAY, blocks, score, recorded=True)
        async with server.served():
            arms = [server.arm(BASELINE), server.arm(CANDIDATE)]
            _, done = await ran(asked, arms, source, tmp_path / "j")
        assert [len(step.late_s) for step in done] == [2, 2, 2, 2]
        gaps = sorted(one.observations[1].at_s - one.observations[0].at_s for one in done)
        assert gaps[0] >= 0.04
        assert gaps[2] >= 0.08

    asyncio.run(check())


def test_the_temperature_of_the_design_holds_for_every_request(tmp_path: Path) -> None:
    async def check() -> None:
        asked, server = hypothesis(aa_control=False, temperature=0.7, cold_blocks=False), Server()
        items = [replace(item, body={**item.body, "temperature": 0.0}) for item in rows(10)]
        async with server.served():
            arms = [server.arm(BASELINE), server.arm(CANDIDATE)]
            await ran(asked, arms, suite(asked, items), tmp_path / "j")
        assert {body["temperature"] for body in server.asked} == {0.7}
        assert all("cache_salt" not in body for body in server.asked)
        assert {body["model"] for body in server.asked} == {"m"}

    asyncio.run(check())


def test_arms_that_take_turns_are_started_where_the_order_changes(tmp_path: Path) -> None:
    """One at a time, each warmed up whenever it starts: 4 blocks in A B B A and again take
    five or six starts, and every row is asked once of each, as where both run.
    """
    began: list[str] = []

    async def check() -> None:
        server = Server()
        async with server.served():

            async def start(name: str) -> Arm:
                began.append(name)
                return server.arm(name)

            asked = hypothesis(aa_control=False, servers="in_turn")
            source = suite(asked, rows(20))
            bench = Bench(asked, {}, {}, {source.name: source}, start)
            todo = planned(asked, source)
            with Journal(tmp_path / "j") as journal:
                assert await run(bench, todo, journal, lambda _step, _done: None) == ""
                done = list(journal.done)
        order = [step.arm for step in todo]
        assert began == [
            arm for arm, before in zip(order, [None, *order], strict=False) if arm != before
        ]
        assert len(began) in (5, 6)
        asked_of = Counter((one.arm, seen.id) for one in done for seen in one.observations)
        assert set(asked_of.values()) == {1}
        assert len(server.asked) == 2 * 20 + 5 * len(began)

    asyncio.run(check())


def test_a_counter_that_the_candidate_does_not_have_is_told_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    """Of a server that we start; one that runs already may show a counter only once it has
    answered, and so is warmed up first. Nothing of either is written.
    """
    sides = {"baseline": {"config": "base.yaml"}, "candidate": {"patch": {"runtime.kv": "int8"}}}

    async def check(ours: bool, metric: str) -> tuple[int, int, str]:
        asked = hypothesis(aa_control=False)
        whole = {**asked.model_dump(), "activation": [{"metric": "steps"}, {"metric": metric}]}
        asked = Hypothesis.model_validate({**whole, **(sides if ours else {})})
        first, second = Server(), Server()
        async with first.served(), second.served():
            arms = [first.arm(BASELINE), second.arm(CANDIDATE)]
            file = tmp_path / f"{ours} {metric}"
            try:
                _, done = await ran(asked, arms, suite(asked, rows(20)), file)
            except Unanswerable as error:
                assert error.where == ("activation", 1, "metric")
                assert not file.read_bytes()
                return len(first.asked), len(second.asked), error.why
            return len(first.asked), len(second.asked), f"{len(done)} blocks"

    warm, whole = 5, 25
    why = asyncio.run(check(True, "stepps"))
    assert why[:2] == (0, 0)
    assert "nothing counts 'stepps' at the candidate's http://" in why[2]
    assert "did you mean 'steps'?" in why[2]
    assert asyncio.run(check(False, "stepps"))[:2] == (warm, warm)
    for there in ("headgate_steps_total", "accepted_tokens", "declared"):
        assert asyncio.run(check(True, there)) == (whole, whole, "8 blocks")
