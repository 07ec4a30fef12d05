"""Asks every arm every block, in the order of the design, and writes each down before the next.

Knows steps, arms and the journal; neither statistics nor files of suites. A run that is started
again goes on behind what its journal has.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from evals.activation import refuse_missing
from evals.arms import Arm, counted, risen, series
from evals.client import Client, Targets
from evals.dataset import Suite
from evals.design import Block, Session, Step
from evals.evaluations import Evaluations, evaluations
from evals.item import Item
from evals.journal import Done, Journal
from evals.pairs import CANDIDATE
from evals.replay import Lateness, Replay
from policies.hypothesis import Design, Hypothesis
from telemetry import Observation

Score = Callable[[Item, Observation], Awaitable[Mapping[str, float]]]
# After each step that was written down: why to stop now, or None.
After = Callable[[Step, Done], str | None]


@dataclass(frozen=True, slots=True)
class Source:
    """A suite or a replay: its blocks, and how its answers are scored."""

    name: str
    blocks: tuple[Block, ...]
    score: Score
    recorded: bool = False  # asked at its own times, not one after another
    suite: Suite | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What asks: the hypothesis, the arms that answer, the targets that they are held to. `start`
    brings up an arm in the place of the one that runs; None: all of `arms` run.
    """

    hypothesis: Hypothesis
    arms: Mapping[str, Arm]
    targets: Mapping[str, Targets]
    sources: Mapping[str, Source]
    start: Callable[[str], Awaitable[Arm]] | None = None


async def run(bench: Bench, steps: Sequence[Step], journal: Journal, after: After) -> str:
    """Runs what is not in the journal yet; why it stopped early, "" where all is done.

    It stops early where `after` says so, where an arm answers as something that it is not, and
    where an arm answers nothing at all: what is left could tell no more.
    """
    left = [step for step in steps if step not in journal]
    if not left:
        return ""
    began = time.monotonic() - max((one.at_s for one in journal.observations), default=0.0)

    def now() -> float:
        return time.monotonic() - began

    async with contextlib.AsyncExitStack() as stack:
        told = stack.enter_context(evaluations())
        crew = _Crew(bench, left, now, stack, told)
        if bench.start is None:
            await crew.warm_up(*bench.arms.values())
        why = None
        for step, following in zip(left, [*left[1:], None], strict=True):
            arm = await crew.arm(step.arm)
            before = await series(arm) if step.arm == CANDIDATE else {}
            done = await _step(bench, await crew.client(arm), arm, step, now)
            if told is not None:
                told.tell(done.observations, time.time() - now())
            if step.arm == CANDIDATE:
                done = replace(done, counters=risen(before, await series(arm)))
            journal.add(done)
            why = why or after(step, done) or _why_to_stop(arm, done)
            # A block is ended in all its arms: half a block would be read as failures.
            if why and (following is None or following.block != step.block):
                return why
    return ""


@dataclass(slots=True)
class _Crew:
    """Who answers, warmed up, with a connection to each."""

    bench: Bench
    left: Sequence[Step]
    now: Callable[[], float]
    stack: contextlib.AsyncExitStack  # connections live as long as it
    told: Evaluations | None = None  # who hears of scores, where somebody does
    clients: dict[str, Client] = field(default_factory=dict)
    running: Arm | None = None

    async def arm(self, name: str) -> Arm:
        if self.bench.start is None:
            return self.bench.arms[name]
        if self.running is None or self.running.name != name:
            self.running = await self.bench.start(name)
            await self.warm_up(self.running)
        return self.running

    async def client(self, arm: Arm) -> Client:
        if arm.url not in self.clients:
            timeout_s, targets = self.bench.hypothesis.design.timeout, self.bench.targets
            traced = None if self.told is None else self.told.header
            client = Client(arm.url, arm.key, timeout_s=timeout_s, targets=targets, traced=traced)
            self.clients[arm.url] = await self.stack.enter_async_context(client)
        return self.clients[arm.url]

    async def warm_up(self, *arms: Arm) -> None:
        """The first blocks of each source, not counted: libraries that are still being loaded,
        kernels that are compiled at their first use. Raises Unanswerable where the candidate does
        not have a counter that should rise: ours has it from the begin on, others perhaps only
        once they have answered.
        """
        ours = self.bench.hypothesis.candidate.url is None
        if ours:
            await self._refuse_uncounted(arms)
        for arm in arms:
            if not arm.broken:
                await self._warm_up(arm)
        if not ours:
            await self._refuse_uncounted(arms)

    async def _warm_up(self, arm: Arm) -> None:
        for name in sorted({step.block.source for step in self.left}):
            for block in self.bench.sources[name].blocks[: self.bench.hypothesis.design.warmup]:
                client = await self.client(arm)
                await _step(self.bench, client, arm, Step(block, arm.name), self.now, warm=True)

    async def _refuse_uncounted(self, arms: Sequence[Arm]) -> None:
        for arm in arms:
            if arm.name == CANDIDATE and not arm.broken:
                refuse_missing(self.bench.hypothesis, await counted(arm), arm.pages)


async def _step(
    bench: Bench,
    client: Client,
    arm: Arm,
    step: Step,
    now: Callable[[], float],
    *,
    warm: bool = False,
) -> Done:
    """One block in one arm; `warm`: to warm it up."""
    design, block = bench.hypothesis.design, step.block
    source = bench.sources[block.source]
    salt = "warm" if warm else "run"
    cold = f"{salt}.{step.arm}.{block.source}.{block.number}" if design.cold_blocks else None
    stats = bench.hypothesis.stats

    async def ask(item: Item) -> Observation:
        seed = seed_of(item, stats.seed, block.repeat)
        asked = replace(item, body=body_for(item.body, arm.model, design, seed))
        if arm.broken:
            return _unanswered(asked, arm, block, now())
        return await client.ask(
            asked, step.arm, block.source, block.number, block.repeat,
            now=now, salt=cold, traced=not warm,
        )  # fmt: skip

    began = now()
    if source.recorded and not arm.broken:
        observations, late = await _played(block, design, ask, now)
    else:
        observations, late = await _asked(block.sessions, design.concurrency, ask), Lateness()
    took_s = now() - began
    items = {item.id: item for item in block.items}
    scored = await asyncio.gather(*(_scored(source, items[seen.id], seen) for seen in observations))
    return Done(*step.key, tuple(scored), late_s=tuple(late.late_s), took_s=took_s)


async def _scored(source: Source, item: Item, seen: Observation) -> Observation:
    return replace(seen, scores=dict(await source.score(item, seen)))


async def _asked(
    sessions: Sequence[Session],
    concurrency: int,
    ask: Callable[[Item], Awaitable[Observation]],
) -> list[Observation]:
    """So many sessions at once, each a turn after the other; in the block's order."""
    answered: list[list[Observation]] = [[] for _ in sessions]
    waiting = iter(enumerate(sessions))

    async def work() -> None:
        for at, session in waiting:
            for item in session:
                answered[at].append(await ask(item))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(sessions))):
            group.create_task(work())
    return [seen for session in answered for seen in session]


async def _played(
    block: Block,
    design: Design,
    ask: Callable[[Item], Awaitable[Observation]],
    now: Callable[[], float],
) -> tuple[list[Observation], Lateness]:
    """Recorded requests at the times they came, from the begin of their block on."""
    items = [
        replace(item, meta={**item.meta, "t_s": float(item.meta["t_s"]) - block.begin_s})
        for item in block.items
    ]
    replay = Replay(ask, speed=design.speed, clock=now)
    seen = [one async for one in replay.observations(items)]
    return sorted(seen, key=lambda one: one.at_s), replay.lateness


def body_for(body: Mapping[str, Any], model: str, design: Design, seed: int) -> dict[str, Any]:
    """The same bytes for every arm but the model's name, which may differ."""
    sent = {**body, "model": model}
    if design.temperature != "as_recorded":
        sent["temperature"] = design.temperature
    sent["seed"] = seed
    return sent


def seed_of(item: Item, seed: int, repeat: int) -> int:
    """The same in every arm, and of rows that ask the same, so that a cache of answers knows them
    again. Other rows do not share one, or all of them would be drawn alike; neither do repeats, or
    they would be none.
    """
    own = item.body.get("seed")
    if not isinstance(own, int):
        asked = orjson.dumps([item.body.get(name) for name in ("messages", "prompt")])
        own = zlib.crc32(asked, seed)
    return own + repeat


def _unanswered(item: Item, arm: Arm, block: Block, at_s: float) -> Observation:
    """Of an arm that does not run: not asked, and not left out."""
    return Observation(
        id=item.id,
        source=block.source,
        arm=arm.name,
        cluster=item.cluster,
        block=block.number,
        repeat=block.repeat,
        tier=item.tier,
        tenant=str(item.meta.get("tenant", "")),
        turn=item.turn,
        at_s=at_s,
        outcome="error",
        status=0,
        problem=arm.broken,
        max_tokens=item.body.get("max_tokens"),
    )


def _why_to_stop(arm: Arm, done: Done) -> str | None:
    allowed = arm.fingerprints
    foreign = {seen.fingerprint for seen in done.observations if seen.fingerprint} - set(allowed)
    if allowed and foreign:
        names = ", ".join(sorted(foreign))
        return f"the {done.arm} arm answered as {names}, and is {', '.join(allowed)}"
    if all(seen.outcome in ("error", "timeout") for seen in done.observations):
        why = done.observations[0].problem.partition("\n")[0]
        return f"the {done.arm} arm answered no request of a whole block: {why}"
    return None
