"""Requests find the replica that has their prompt; what was foreseen and found is told."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cache.prefix_index import PrefixIndex
from gateway.call import CHAT_PATH, Call
from gateway.ladder import Ladder
from gateway.prompt import Prompt
from gateway.replica import Replica
from gateway.routing import Routing, session_of
from gateway.usage import Usage
from policies.routing import Routing as Policy
from tests.gateway.world import DONE, STREAMED, Peer, gateway, on_loop, until, upstream

ROOT = Path(__file__).parents[2]


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "stream": True, "messages": [{"role": "user", "content": text}]} | more


def usage(prompt_tokens: int, cached_tokens: int) -> bytes:
    told = {
        "choices": [],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 1,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        },
    }
    return b"data: " + json.dumps(told).encode() + b"\n\n"


async def counting(peer: Peer) -> None:
    await peer.stream(b'data: {"choices":[]}\n\n', usage(100, 64), DONE)


@on_loop
async def test_a_conversation_stays_where_its_prompt_is_cached() -> None:
    """Ten conversations of three turns over four replicas: each at one, and not all at the same."""
    fakes = [upstream(counting) for _ in range(4)]
    async with fakes[0] as a, fakes[1] as b, fakes[2] as c, fakes[3] as d:
        async with gateway(a, b, c, d) as edge:
            for number in range(10):
                text = f"conversation {number} " * 100
                for turn in range(3):
                    text += f"turn {turn} " * 50
                    assert (await edge.post(asked(text))).is_success
        places = [
            {json.loads(r.body)["messages"][0]["content"][:20] for r in fake.requests}
            for fake in (a, b, c, d)
        ]
        assert sum(map(len, places)) == 10
        assert (
            max(map(len, places)) <= 8
        )  # rates are learned from real time, so a few may look fast


@on_loop
async def test_what_was_decided_is_told_and_comes_out_again(tmp_path: Path) -> None:
    """The answer names its receipt; the receipt holds the decision, the attempts and what was
    found, and no text; deciding again from the file gives the same."""
    async with upstream(counting) as one, upstream(counting) as two, gateway(one, two) as edge:
        first = await edge.post(asked("a secret word " * 40))
        second = await edge.post(asked("a secret word " * 40))
        path = f"/v1/receipts/{second.headers['x-headgate-receipt']}"
        told = await edge.client.get(path)
        everything = await edge.client.get("/v1/receipts")
        missing = await edge.client.get("/v1/receipts/rcpt_0")
        health = (await edge.client.get("/health")).json()
    receipt = told.json()
    assert b"secret" not in told.content
    assert (receipt["told_prompt_tokens"], receipt["told_cached_tokens"]) == (100, 64)
    assert [one["outcome"] for one in receipt["attempts"]] == ["200"]
    assert receipt["foreseen"]["captured"] > 0
    assert receipt["ttft_s"] > 0
    ids = [one["id"] for one in everything.json()["data"]]
    assert ids == [first.headers["x-headgate-receipt"], receipt["id"]]
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "receipt_not_found")
    assert len(health["routing"]["replicas"]) == 2
    assert health["cached_tokens"]["delivered"] == 128
    file = tmp_path / "receipts.json"
    file.write_bytes(everything.content)
    await asyncio.to_thread(decides_again, file)


def decides_again(file: Path) -> None:
    command = [sys.executable, "-m", "headgate", "explain", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same choice comes out") == 2
    policy = file.with_suffix(".yaml")
    policy.write_text(
        "version: 1\ngateway: {routing: {policy: round_robin}}\nupstreams: [{url: http://x}]\n"
    )
    done = subprocess.run(
        [*command, "--policy", str(policy), "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["decisions"] == 2
    whole = json.loads(file.read_text())
    whole["data"][0]["decisions"][0]["options"][0]["in_flight"] += 1000
    file.write_text(json.dumps(whole))
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == 1


@on_loop
async def test_a_receipt_tells_what_was_trimmed_and_by_which_rule(tmp_path: Path) -> None:
    """Before it went anywhere; `headgate explain` says it. Of tools' outputs and passages neither
    the answer's header nor a counter told anything."""
    rounds = [{"role": "user", "content": "one " * 300}, {"role": "assistant", "content": "yes"}]
    output = {"role": "tool", "tool_call_id": "1", "content": "word " * 300}
    short = STREAMED | {"messages": [output, {"role": "user", "content": "and?"}]}
    long = STREAMED | {"messages": [*rounds, output, {"role": "user", "content": "and?"}]}
    trim = {"tool_output_chars": 500, "drop": "oldest", "budget_tokens": 300}
    async with upstream(counting) as one, gateway(one, trim=trim) as edge:
        answers = [await edge.post(STREAMED), await edge.post(short), await edge.post(long)]
        everything = await edge.client.get("/v1/receipts")
        page = (await edge.client.get("/metrics")).text
    plain, masked, cut = (receipt["trimmed"] for receipt in everything.json()["data"])
    assert plain is None
    assert masked["tool_output_tokens"] > 200
    assert (masked["round_tokens"], masked["cut"]["end"]) == (0, 0)
    assert (cut["cut"]["start"], cut["cut"]["end"]) == (0, 3)
    assert cut["round_tokens"] > 300
    removed = [left["before_tokens"] - left["after_tokens"] for left in (masked, cut)]
    told = [answer.headers.get("x-headgate-trimmed-tokens") for answer in answers]
    assert told == [None, *map(str, removed)]
    assert f'headgate_gateway_trimmed_tokens_total{{what="removed"}} {sum(removed)}.0' in page
    assert f'stage="trimmed"}} {sum(removed)}.0' in page
    file = tmp_path / "receipts.json"
    file.write_bytes(everything.content)
    command = [sys.executable, "-m", "headgate", "explain", str(file)]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("trimmed")]
    assert said == [
        f"trimmed from {masked['before_tokens']} to {masked['after_tokens']} tokens: "
        f"{removed[0]} by tool_output_chars",
        f"trimmed from {cut['before_tokens']} to {cut['after_tokens']} tokens: "
        f"{cut['round_tokens']} by drop (messages 0 to 2), "
        f"{cut['tool_output_tokens']} by tool_output_chars",
    ]


@on_loop
async def test_nothing_stays_booked_whatever_ends_a_request() -> None:
    """Answered, failed, cut, left by its client: no prompt counts as waiting afterwards."""

    async def cut(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(b'data: {"choices":[]}\n\n')
        peer.abort()

    async def fail(peer: Peer) -> None:
        await peer.json({"error": {"message": "no", "code": "x"}}, status=400)

    async def silent(_peer: Peer) -> None:
        await asyncio.Event().wait()

    for answer in (counting, cut, fail, silent):
        async with upstream(answer) as fake, gateway(fake) as edge:
            _, writer = await edge.send(asked("word " * 100))
            await until(lambda: len(fake.requests) >= 1)
            if answer is silent:
                assert edge.pool.replicas[0].waiting_tokens > 0
                writer.transport.abort()
            await until(lambda: edge.pool.in_flight == 0)
            assert edge.pool.replicas[0].waiting_tokens == 0
            health = (await edge.client.get("/health")).json()
            assert all(one["waiting_tokens"] == 0 for one in health["routing"]["replicas"].values())


# ---- without sockets: a fleet on a clock of its own ---------------------------------------------


class World:
    """Replicas that answer at once, or when they are told to, and a clock."""

    def __init__(self, count: int, **policy: Any) -> None:
        self.now = 1000.0
        self.replicas = [
            Replica(f"http://r{at}", models={"m": {}}, healthy=True) for at in range(count)
        ]
        self.index = PrefixIndex()
        self.ladder = Ladder()
        self.routing = Routing(
            Policy(**policy),
            self.index,
            self.ladder,
            clock=lambda: self.now,
            rng=random.Random(7),
        )

    def send(self, hashes: tuple[bytes, ...], tier: str = "standard", **data: Any) -> tuple:
        prompt = Prompt(16 * len(hashes) + 3, hashes, exact=True)
        call = Call(CHAT_PATH, "m", True, b"{}", data=data)
        trip = self.routing.trip(call, prompt, tier, "t")
        chosen = trip.choose(self.replicas, "m")
        assert chosen is not None
        booking = trip.book(chosen)
        chosen.in_flight += 1
        return trip, chosen, booking

    def finish(self, trip: Any, chosen: Replica, booking: Any, after_s: float = 0.1) -> None:
        self.now += after_s
        booking.first_token()
        trip.served(booking, None)
        booking.end()
        chosen.in_flight -= 1


def chain(*parts: object) -> tuple[bytes, ...]:
    return tuple(str(parts[: end + 1]).encode() for end in range(len(parts)))


@pytest.mark.parametrize("replicas", [4, 8])
def test_a_common_first_block_never_collapses_the_fleet(replicas: int) -> None:
    """In a real trace every conversation shares its first block: one after another, on an idle
    fleet, they are still spread, and stay with their own. (Plain longest prefix sends all to one.)
    """
    world = World(replicas)
    placed: dict[str, list[int]] = {replica.url: [] for replica in world.replicas}
    for number in range(50 * replicas):
        whole = chain("system", number, *range(20))
        for turn in range(2):
            trip, chosen, booking = world.send(whole[: 12 + 10 * turn])
            world.finish(trip, chosen, booking)
            placed[chosen.url].append(number)
    counts = [len(set(numbers)) for numbers in placed.values()]
    assert max(counts) < 1.4 * sum(counts) / len(counts)
    assert sum(counts) < 1.1 * 50 * replicas  # conversations that moved


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    """Eight at once, none of which has a first token yet: one replica computes."""
    world = World(4)
    sent = [world.send(chain("burst", *range(200)), tier="batch") for _ in range(8)]
    assert len({chosen.url for _, chosen, _ in sent}) == 1


def test_different_prompts_that_come_together_are_spread() -> None:
    world = World(4)
    sent = [world.send(chain(number, *range(200))) for number in range(8)]
    counts = [sum(chosen is one for _, chosen, _ in sent) for one in world.replicas]
    assert counts == [2, 2, 2, 2]


def test_rates_are_learned_from_first_tokens_and_slow_replicas_get_less() -> None:
    """One of two takes four times as long for a token: it gets a fifth, or little more."""
    world = World(2)
    due: list[tuple[float, tuple]] = []
    free = dict.fromkeys((replica.url for replica in world.replicas), 0.0)
    counts = dict.fromkeys(free, 0)
    for number in range(600):
        world.now += 0.09
        for at, one in [entry for entry in due if entry[0] <= world.now]:
            now, world.now = world.now, at
            world.finish(*one, after_s=0.0)
            world.now = now
        due = [entry for entry in due if entry[0] > world.now]
        one = world.send(chain(number, *range(50)))
        url = one[1].url
        speed = 8000 if url == "http://r0" else 2000
        free[url] = max(free[url], world.now) + 16 * 51 / speed
        due.append((free[url], one))
        counts[url] += number >= 300
    assert 0.08 < counts["http://r1"] / 300 < 0.35


def test_predictions_that_do_not_hold_decide_nothing() -> None:
    """First tokens that come at random: `auto` becomes a choice of two, and says so."""
    world = World(2)
    rng = random.Random(3)
    for number in range(120):
        one = world.send(chain(number, *range(50)))
        world.finish(*one, after_s=rng.choice([0.001, 60.0]))
    trip, _, _ = world.send(chain("next"))
    assert trip.receipt.decisions[0].ask.policy == "p2c"
    told = world.routing.report()["replicas"]
    assert not any(one["trusted"] for one in told.values())  # type: ignore[attr-defined]


def test_a_replica_that_forgets_is_taken_to_hold_less() -> None:
    """It finds nothing of what was sent before: its blocks are counted on for less long."""
    world = World(1)
    for number in range(40):
        trip, chosen, booking = world.send(chain("same", *range(30)))
        world.now += 0.1
        booking.first_token()
        trip.served(booking, Usage(16 * 31 + 3, 1, 0 if number else None))
        booking.end()
        chosen.in_flight -= 1
    assert world.routing.known(chosen.url).capacity_blocks < 2**15 / 10
    assert world.ladder.delivered == 0
    assert world.ladder.evicted > 0


def test_a_session_is_a_hint() -> None:
    """Its header, or the body's fields; where prompts say nothing, it goes where it was."""
    call = Call(CHAT_PATH, "m", True, b"", headers={"x-session-id": "s"}, data={"user": "u"})
    assert session_of(call) == "s"
    assert session_of(Call(CHAT_PATH, "m", True, b"", data={"prompt_cache_key": "k"})) == "k"
    assert session_of(Call(CHAT_PATH, "m", True, b"", data={"user": 5})) is None
    world = World(8)
    places = set()
    for _ in range(12):
        one = world.send((), user="u")
        places.add(one[1].url)
        world.finish(*one)
    assert len(places) == 1


def test_what_was_learned_goes_on_under_a_new_policy() -> None:
    world = World(2)
    world.finish(*world.send(chain(1, 2, 3)))
    after = Routing(Policy(policy="p2c"), world.index, world.ladder, before=world.routing)
    assert after.known(world.replicas[0].url) is world.routing.known(world.replicas[0].url)
    assert after.turns == 1
