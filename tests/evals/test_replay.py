"""When requests are sent, in virtual time; and the command, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings, strategies as st

from evals.commands.replay import replay
from evals.item import Item
from evals.replay import AT_ONCE, Lateness, Replay
from evals.summary import attained, quantile, summarize
from telemetry import Observation
from tests.gateway.scripted import Engine
from tests.gateway.world import Answer, Fake, Peer, on_loop, until, upstream


class World:
    """Virtual time, and a server that answers at once, or after `turns` of the loop, or when it is
    told to."""

    def __init__(self, *, turns: int = 0, when_told: bool = False, stall_s: float = 0.0) -> None:
        self.now = 0.0
        self.sent: list[tuple[float, str]] = []
        self.most = 0
        self.answered = asyncio.Event()
        self._turns = turns
        self._when_told = when_told
        self._stall_s = stall_s
        self._running = 0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Time goes on when the generator waits, and a little further when it stalls."""
        self.now += seconds + self._stall_s
        await asyncio.sleep(0)

    async def ask(self, item: Item) -> Observation:
        self.sent.append((self.now, item.id))
        self._running += 1
        self.most = max(self.most, self._running)
        if self._when_told:
            await self.answered.wait()
        for _ in range(self._turns):
            await asyncio.sleep(0)
        self._running -= 1
        return Observation(item.id, "replay:t", "a", item.cluster)


def items(*moments: float) -> list[Item]:
    return [Item(f"{at:g}", "c", 0, {}, meta={"t_s": at}) for at in moments]


async def played(replay: Replay, given: Iterable[Item]) -> list[str]:
    return [seen.id async for seen in replay.observations(given)]


@settings(deadline=None)  # a busy machine is slow now and then
@given(
    st.lists(st.floats(0, 1000), max_size=20).map(sorted),
    st.floats(0.1, 50),
)
def test_requests_are_sent_when_they_came_at_any_speed(moments: list[float], speed: float) -> None:
    """In their order, none before it is due, and all of them."""

    async def run() -> None:
        world = World()
        play = Replay(world.ask, speed=speed, clock=world.clock, sleep=world.sleep)
        assert len(await played(play, items(*moments))) == len(moments)
        assert [at for at, _ in world.sent] == pytest.approx([at / speed for at in moments])
        assert not play.lateness.saturated

    asyncio.run(run())


def test_nobody_waits_for_an_answer() -> None:
    """Open loop: a server that says nothing gets all the load that was recorded."""

    async def run() -> None:
        world = World(when_told=True)
        play = Replay(world.ask, clock=world.clock, sleep=world.sleep)
        task = asyncio.create_task(played(play, items(*range(50))))
        await until(lambda: len(world.sent) == 50)
        assert world.most == 50
        world.answered.set()
        assert len(await task) == 50

    asyncio.run(run())


def test_as_fast_as_possible_keeps_to_its_bound() -> None:
    """Moments do not matter then, and nothing is late."""

    async def run() -> None:
        world = World(turns=200)
        play = Replay(world.ask, speed=None, clock=world.clock, sleep=world.sleep)
        await played(play, items(*range(200)))
        assert (world.most, world.now, play.lateness.late_s) == (AT_ONCE, 0, [])
        world = World(turns=200)
        play = Replay(world.ask, speed=None, at_once=3, clock=world.clock, sleep=world.sleep)
        await played(play, items(*range(20)))
        assert world.most == 3

    asyncio.run(run())


def test_a_generator_that_falls_behind_says_so() -> None:
    """What it measures then is its own slowness."""

    async def run() -> None:
        world = World(stall_s=0.25)
        play = Replay(world.ask, clock=world.clock, sleep=world.sleep)
        await played(play, items(*range(20)))
        assert play.lateness.saturated
        assert play.lateness.quantile(0.5) == pytest.approx(0.25)

    asyncio.run(run())
    assert not Lateness().saturated
    assert not Lateness([0.01] * 99 + [5.0]).saturated
    assert Lateness([0.01] * 97 + [5.0] * 3).saturated


def test_whoever_stops_listening_ends_what_is_under_way() -> None:
    """No request outlives the replay."""

    async def run() -> None:
        world = World(when_told=True)
        play = Replay(world.ask, clock=world.clock, sleep=world.sleep)
        task = asyncio.create_task(played(play, items(*range(9))))
        await until(lambda: len(world.sent) == 9)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_a_speed_that_is_none_is_refused() -> None:
    for speed in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="speed"):
            Replay(World().ask, speed=speed, clock=lambda: 0.0)


# ---- the summary --------------------------------------------------------------------------------


def test_failures_count_in_every_share() -> None:
    """A refused request met no target, and is no answer a second."""
    met = Observation("1", "s", "a", "1", tier="t", ttft_s=0.1, ttft_target_s=0.2, e2e_s=1.0)
    late = Observation("2", "s", "a", "2", tier="t", ttft_s=0.3, ttft_target_s=0.2, e2e_s=2.0)
    gone = Observation("3", "s", "a", "3", tier="t", outcome="refused", problem="full",
                       ttft_target_s=0.2)  # fmt: skip
    told = summarize((met, late, gone), 2.0)
    assert told["outcomes"] == {"ok": 2, "refused": 1}
    assert told["requests_per_s"] == 1.0
    assert told["tiers"] == {"t": {"requests": 3, "ok": 2, "slo": 1 / 3}}
    assert told["problems"] == [["full", 1]]
    assert attained([Observation("1", "s", "a", "1")]) is None


@settings(deadline=None)  # a busy machine is slow now and then
@given(st.lists(st.floats(0, 10), min_size=1), st.floats(0.001, 1))
def test_a_quantile_is_the_least_value_that_so_many_do_not_exceed(
    values: list[float], share: float
) -> None:
    found = quantile(values, share)
    assert found is not None
    assert sum(one <= found for one in values) >= share * len(values) - 1e-9
    assert sum(one < found for one in values) < share * len(values) + 1e-9


# ---- the command --------------------------------------------------------------------------------

BODY = {"model": "recorded", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


def recorded(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "traffic.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


async def run(server: Fake, *arguments: str) -> Result:
    """The command in a thread of its own, as a program has its own loop."""
    command = [*arguments, "--url", server.url]
    return await asyncio.to_thread(CliRunner().invoke, replay, command)


async def ran(answer: Answer, *arguments: str) -> tuple[Result, list[dict[str, Any]]]:
    async with upstream(answer) as server:
        result = await run(server, *arguments)
        return result, [json.loads(request.body) for request in server.requests]


@on_loop
async def test_the_command_plays_a_file_and_tells_what_came_of_it(tmp_path: Path) -> None:
    """The model that is served is asked where the recorded one is not."""
    file = recorded(tmp_path, *({"t_ms": at * 10, "body": BODY} for at in range(5)))
    out = tmp_path / "seen.jsonl"
    result, bodies = await ran(Engine("e"), str(file), "--json", "--out", str(out), "--arm", "x")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert (told["requests"], told["outcomes"], told["model"]) == (5, {"ok": 5}, "m")
    assert told["times"]["ttft_s"]["p50"] > 0
    assert [body["model"] for body in bodies] == ["m"] * 5
    seen = [Observation.of(json.loads(line)) for line in out.read_text("utf-8").splitlines()]
    assert {one.arm for one in seen} == {"x"} and all(one.ok for one in seen)
    assert {one.source for one in seen} == {"replay:traffic"}


@on_loop
async def test_the_command_measures_how_long_words_are(tmp_path: Path) -> None:
    """Made-up prompts come out as long as was recorded, by this server's count."""

    async def answer(peer: Peer) -> None:
        words = json.loads(peer.request.body)["messages"][0]["content"].split()
        usage = {"prompt_tokens": 3 * len(words) + 11, "completion_tokens": 1}
        choice = {"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}
        chunk = {"choices": [choice], "usage": usage}
        await peer.stream(b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n")

    file = tmp_path / "t.csv"
    file.write_text("t_s,client,input_tokens,output_tokens\n0,1,1211,5\n0.01,2,611,5\n")
    result, bodies = await ran(answer, str(file), "--json")
    assert result.exit_code == 0, result.output
    assert [len(body["messages"][0]["content"].split()) for body in bodies[2:]] == [400, 200]
    assert json.loads(result.output)["prompt_tokens"] == 1211 + 611


@on_loop
async def test_the_command_counts_failures_and_does_not_hide_them(tmp_path: Path) -> None:
    """A run in which every request failed is no success."""

    async def broken(peer: Peer) -> None:
        await peer.json({"error": {"message": "out of order"}}, 500)

    async def full(peer: Peer) -> None:
        await peer.json({"error": {"message": "full"}}, 429)

    file = recorded(tmp_path, *({"t_ms": 0, "body": BODY} for _ in range(3)))
    for answer, words in ((broken, "error 3"), (full, "refused 3")):
        result, _ = await ran(answer, str(file), "--speed", "max")
        assert result.exit_code == 1
        assert words in result.output


def test_the_command_refuses_what_it_cannot_play(tmp_path: Path) -> None:
    """With the line where there is one."""
    file = recorded(tmp_path, {"t_ms": 0, "body": {"model": "m"}})
    result = CliRunner().invoke(replay, [str(file)])
    assert result.exit_code == 2
    assert "traffic.jsonl:1  body" in result.output
    assert CliRunner().invoke(replay, [str(file), "--speed", "0"]).exit_code == 2
    file = recorded(tmp_path, {"t_ms": 0, "body": BODY})
    result = CliRunner().invoke(replay, [str(file), "--begin", "5"])
    assert (result.exit_code, "no request came then" in result.output) == (2, True)
