"""The life of a fleet, on a cluster that is simulated: nodes that die, fill up, and come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fleet.cluster import Hosted, Job, Look, Lost, NoRoom, Unheard
from fleet.controller import Controller, Refused
from fleet.scaling import Demand
from policies.fleet import Fleet
from policies.load import load_members
from tests.gateway.world import on_loop, until

JOB = Job("", "p.yaml", "d", "v", 0, "key", {}, 60.0, drain_s=5.0)


@dataclass
class Simulated:
    """A replica on a simulated node, its actor and its worker."""

    domain: str
    job: Job
    url: str
    fails: Lost | None = None
    held: asyncio.Event | None = None
    looks: bool = True  # its actor answers
    answers: bool = True  # its worker answers
    running: bool = True  # its process
    busy: int = 0
    stopped: bool = False
    looked: int = 0

    async def start(self) -> str:
        if self.held is not None:
            await self.held.wait()
        if self.fails is not None:
            raise self.fails
        return self.url

    async def look(self) -> Look:
        self.looked += 1
        if not self.looks:
            raise Unheard("the control plane is away")
        return Look(self.running, ("out of memory",))

    async def stop(self) -> None:
        self.stopped = True


@dataclass
class Nodes:
    """A cluster with one place in each domain, unless told otherwise."""

    places: dict[str, int]
    replicas: dict[str, Simulated] = field(default_factory=dict)
    rooms: dict[str, str] = field(default_factory=dict)  # name -> domain
    fails: list[Lost] = field(default_factory=list)  # of the next starts
    held: asyncio.Event | None = None
    left: dict[str, tuple[str, Hosted]] = field(default_factory=dict)  # by an earlier program
    asked: list[str | None] = field(default_factory=list)
    count: int = 0

    async def domains(self) -> Sequence[str]:
        await asyncio.sleep(0)  # as a question to a cluster, which lets others go on
        return list(self.places)

    async def place(
        self, name: str, domain: str | None, avoid: Collection[str], wait_s: float | None
    ) -> str:
        self.asked.append(domain)
        while True:
            wanted = [domain] if domain else [one for one in self.places if one not in avoid]
            for one in wanted:
                taken = list(self.rooms.values()).count(one)
                if taken < self.places.get(one, 0):
                    self.rooms[name] = one
                    return one
            if wait_s is not None:
                raise NoRoom(str(domain))
            await asyncio.sleep(0.001)

    async def host(self, job: Job) -> Hosted:
        self.count += 1
        url = f"http://node:{self.count}"
        fails = self.fails.pop(0) if self.fails else None
        made = Simulated(self.rooms[job.name], job, url, fails, self.held)
        self.replicas[job.name] = made
        return made

    async def release(self, name: str) -> None:
        self.rooms.pop(name, None)
        self.replicas.pop(name, None)

    async def adopt(self) -> Mapping[str, tuple[str, Hosted]]:
        return self.left

    async def health(self, host: str, port: int, key: str | None) -> tuple[int, dict[str, Any]]:
        """What the worker at a URL says."""
        assert (host, key) == ("node", "key")
        every = [*self.replicas.values(), *(one for _, one in self.left.values())]
        for one in every:
            if one.url == f"http://node:{port}" and one.answers:  # type: ignore[attr-defined]
                return 200, {"running": one.busy, "waiting": 0}  # type: ignore[attr-defined]
        return 0, {}

    def domains_taken(self) -> list[str]:
        return sorted(self.rooms.values())


@dataclass
class World:
    nodes: Nodes
    book: Path
    fleet: Controller
    demand: list[Demand | None]
    clock: list[float]

    def listed(self) -> dict[str, bool]:
        """URL -> whether it drains, as gateways read the file."""
        return {one.url: one.drain for one in load_members(self.book).replicas}

    def ready(self, count: int) -> bool:
        return sum(unit.ready for unit in self.fleet.units) == count == len(self.listed())


@asynccontextmanager
async def running(folder: Path, nodes: Nodes, **settings: Any) -> AsyncIterator[World]:
    """A fleet whose clock stands still unless it is moved; it is ended in order."""
    book = folder / "replicas.yaml"
    book.write_text("replicas: []\n")
    demand: list[Demand | None] = [Demand(0, 0)]
    clock = [1000.0]

    async def ask() -> Demand | None:
        return demand[0]

    fleet = Controller(
        nodes,
        Fleet(**{"up_after_s": 0.0, "down_after_s": 0.0, "running": 1, **settings}),
        JOB,
        book,
        ask,
        ask=nodes.health,
        now=lambda: clock[0],
        tick_s=0.002,
        told_s=0.0,
    )
    task = asyncio.create_task(fleet.run())
    try:
        yield World(nodes, book, fleet, demand, clock)
        for one in nodes.replicas.values():
            one.busy = 0
        fleet.end()
        await task
        assert nodes.rooms == {}  # nothing is left behind
        assert load_members(book).replicas == ()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


def spread(count: int) -> Nodes:
    return Nodes({f"zone-{number}": 1 for number in range(count)})


@on_loop
async def test_replicas_are_spread_and_told_to_the_gateways_once_ready(tmp_path: Path) -> None:
    """One in each domain; each is listed when it is ready, not before. A lease is renewed while the
    model loads, too: once one that loaded for longer ended itself."""
    nodes = spread(3)
    nodes.held = asyncio.Event()
    async with running(tmp_path, nodes, replicas_min=2) as world:
        await until(lambda: len(nodes.replicas) == 2)
        await until(lambda: all(one.looked > 2 for one in nodes.replicas.values()))
        assert world.listed() == {}
        assert world.fleet.health()[0] == 503
        nodes.held.set()
        await until(lambda: world.ready(2))
        status, body = world.fleet.health()
        assert (status, body["target"]) == (200, 2)
        assert {row["domain"] for row in body["fleet"]} == {"zone-0", "zone-1"}
        stopping = list(nodes.replicas.values())
    assert all(one.stopped for one in stopping)


@on_loop
async def test_replicas_that_begin_together_do_not_choose_the_same_domain(tmp_path: Path) -> None:
    """Both asked which domains there are before either had chosen, and went to the first one."""
    nodes = Nodes({"zone-0": 2, "zone-1": 2})
    async with running(tmp_path, nodes, replicas_min=2, spread="strict") as world:
        await until(lambda: world.ready(2))
        assert nodes.domains_taken() == ["zone-0", "zone-1"]


@on_loop
async def test_replicas_that_wait_together_do_not_end_in_the_same_domain(tmp_path: Path) -> None:
    """A new domain with room for both takes one of them; the other goes on waiting."""
    nodes = spread(1)
    async with running(tmp_path, nodes, replicas_min=3, spread="strict") as world:
        await until(lambda: nodes.asked.count(None) == 2)
        nodes.places["zone-1"] = 2
        await until(lambda: nodes.asked.count(None) == 3 and world.ready(2))
        assert nodes.domains_taken() == ["zone-0", "zone-1"]
        nodes.places["zone-2"] = 1
        await until(lambda: world.ready(3))


@pytest.mark.parametrize(
    ("fault", "patience_s"),
    [({"running": False, "answers": False}, 0), ({"looks": False, "answers": False}, 6),
     ({"answers": False}, 61)],
    ids=["its worker ends", "its node is gone", "its worker hangs"],
)  # fmt: skip
@on_loop
async def test_a_lost_replica_is_unlisted_and_replaced_in_another_domain(
    tmp_path: Path, fault: dict[str, bool], patience_s: float
) -> None:
    """At once where its end is known; where nobody says anything, after a while and not before."""
    nodes = spread(3)
    async with running(tmp_path, nodes, replicas_min=2) as world:
        await until(lambda: world.ready(2))
        victim = next(one for one in nodes.replicas.values() if one.domain == "zone-0")
        for name, value in fault.items():
            setattr(victim, name, value)
        if patience_s:
            world.clock[0] += patience_s - 2
            await asyncio.sleep(0.03)
            assert victim.url in world.listed()
            world.clock[0] += 2
        await until(lambda: victim.url not in world.listed())
        world.clock[0] += 1.0  # the pause before another try
        await until(lambda: world.ready(2))
        assert nodes.domains_taken() == ["zone-1", "zone-2"]


@on_loop
async def test_a_control_plane_that_is_away_does_not_empty_the_fleet(tmp_path: Path) -> None:
    """Workers that answer are there, whatever the cluster says of their actors."""
    nodes = spread(2)
    async with running(tmp_path, nodes, replicas_min=2) as world:
        await until(lambda: world.ready(2))
        before = world.listed()
        for one in nodes.replicas.values():
            one.looks = False
        world.clock[0] += 1000
        await asyncio.sleep(0.05)
        assert world.listed() == before


@on_loop
async def test_a_cluster_without_room_is_waited_for(tmp_path: Path) -> None:
    """`prefer` shares a domain at last; `strict` waits for another one. Both wait by asking for
    room anywhere, which a cluster that can grow sees."""
    shared = Nodes({"zone-0": 2})
    async with running(tmp_path, shared, replicas_min=2) as world:
        await until(lambda: world.ready(2))
    alone = Nodes({"zone-0": 2})
    async with running(tmp_path, alone, replicas_min=2, spread="strict") as world:
        await until(lambda: world.ready(1) and None in alone.asked)
        await asyncio.sleep(0.02)
        assert alone.domains_taken() == ["zone-0"]
        alone.places["zone-1"] = 1
        await until(lambda: world.ready(2))
        assert alone.domains_taken() == ["zone-0", "zone-1"]


@on_loop
async def test_demand_takes_the_fleet_up_and_down_between_its_bounds(tmp_path: Path) -> None:
    """Who leaves is told to gateways first, finishes what it runs, and is stopped then."""
    nodes = spread(4)
    async with running(tmp_path, nodes, replicas_min=1, replicas_max=3) as world:
        await until(lambda: world.ready(1))
        world.demand[0] = Demand(0, 100)
        await until(lambda: world.ready(3))
        for one in nodes.replicas.values():
            one.busy = 1
        world.demand[0] = Demand(0, 2)
        await until(lambda: sum(world.listed().values()) == 1)
        await asyncio.sleep(0.02)
        (url,) = [url for url, drains in world.listed().items() if drains]
        leaving = next(one for one in nodes.replicas.values() if one.url == url)
        assert not leaving.stopped
        leaving.busy = 0
        await until(lambda: leaving.stopped)
        assert url not in world.listed()
        world.demand[0] = None  # gateways that do not answer change nothing
        await asyncio.sleep(0.02)
        assert world.ready(2)


@on_loop
async def test_a_drain_has_an_end(tmp_path: Path) -> None:
    """What still runs after `drain_s` is told to stop."""
    nodes = spread(2)
    async with running(tmp_path, nodes, replicas_min=1, replicas_max=2) as world:
        world.demand[0] = Demand(0, 2)
        await until(lambda: world.ready(2))
        every = list(nodes.replicas.values())
        for one in every:
            one.busy = 1
        world.demand[0] = Demand(0, 1)
        await until(lambda: sum(world.listed().values()) == 1)
        world.clock[0] += JOB.drain_s
        await until(lambda: sum(one.stopped for one in every) == 1)


@on_loop
async def test_what_an_earlier_program_left_goes_on(tmp_path: Path) -> None:
    """A fleet that is started again finds its replicas, starts none, and numbers on."""
    nodes = spread(3)
    nodes.rooms = {"replica-7": "zone-1"}
    old = Simulated("zone-1", JOB, "http://node:70")
    nodes.left = {"replica-7": ("zone-1", old)}
    async with running(tmp_path, nodes, replicas_min=1) as world:
        await until(lambda: world.ready(1))
        assert world.listed() == {"http://node:70": False}
        assert nodes.count == 0
        world.demand[0] = Demand(0, 2)
        await until(lambda: world.ready(2))
        assert set(nodes.replicas) == {"replica-8"}


@on_loop
async def test_failures_of_starts_are_tried_again_with_growing_pauses(tmp_path: Path) -> None:
    nodes = spread(2)
    nodes.fails = [Lost("no driver"), Lost("no driver")]
    async with running(tmp_path, nodes, replicas_min=1) as world:
        await until(lambda: nodes.count == 1 and not world.fleet.units)
        world.clock[0] += 0.6
        await until(lambda: nodes.count == 2 and not world.fleet.units)
        world.clock[0] += 0.6  # not yet: the second pause is a second
        await asyncio.sleep(0.02)
        assert nodes.count == 2
        world.clock[0] += 0.6
        await until(lambda: world.ready(1))


@pytest.mark.parametrize("served", [False, True])
@on_loop
async def test_what_no_node_can_serve_ends_the_fleet_unless_others_are_served(
    tmp_path: Path, served: bool
) -> None:
    """A model that is refused at the start is a mistake; on one node later, it is that node's."""
    nodes = spread(3)
    refused = Lost("its worker ended with exit code 3", refused=True)
    if not served:
        nodes.fails = [refused]
        with pytest.raises(Refused, match="replica-1: its worker ended with exit code 3"):
            async with running(tmp_path, nodes, replicas_min=1) as world:
                await until(lambda: world.fleet._failed is not None)
        return
    async with running(tmp_path, nodes, replicas_min=1) as world:
        await until(lambda: world.ready(1))
        nodes.fails = [refused]
        world.demand[0] = Demand(0, 2)
        await until(lambda: nodes.count == 2 and len(world.fleet.units) == 1)
        world.clock[0] += 1
        await until(lambda: world.ready(2))


@on_loop
async def test_a_replica_that_starts_for_too_long_is_given_up(tmp_path: Path) -> None:
    nodes = spread(1)
    nodes.held = asyncio.Event()
    async with running(tmp_path, nodes, replicas_min=1, start_timeout_s=0.01) as world:
        await until(lambda: nodes.count == 1 and not world.fleet.units)
        assert nodes.rooms == {}


@on_loop
async def test_a_bug_is_raised_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Not swallowed in a task, whose replica would be begun again and again."""
    nodes = spread(1)

    async def broken(job: Job) -> Hosted:
        raise ZeroDivisionError

    nodes.host = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        async with running(tmp_path, nodes, replicas_min=1) as world:
            await until(lambda: world.fleet._failed is not None)
    assert nodes.rooms == {}
