"""The cluster that Ray knows; the only importer of ray.

A replica is a detached actor in a placement group of its own, both under the replica's name in a
namespace of the run: they outlive the program that made them, so that its next life finds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fleet.cluster import Hosted, Job, Look, Lost, NoRoom, Unheard
from fleet.replica import Replica

_LOOK_S = 5.0  # for an actor's answer
_LEASE_LOOK_S = 1.0
_PLACED_S = 0.2  # between looks whether a placement group has its room


@dataclass(frozen=True, slots=True)
class Share:
    """What a replica takes of a node, and the label that names a node's failure domain."""

    cpus: float
    gpus: float
    resources: Mapping[str, float]
    label: str

    @property
    def bundle(self) -> dict[str, float]:
        gpus = {"GPU": self.gpus} if self.gpus else {}
        return {"CPU": self.cpus, **gpus, **self.resources}


class NoCluster(Exception):
    """There is no Ray cluster at the address."""


def connect(address: str, namespace: str) -> None:
    """Joins an existing cluster. Raises NoCluster."""
    try:
        ray.init(address, namespace=namespace, log_to_driver=False, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NoCluster(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None


class RayCluster:
    """Placement groups and actors."""

    def __init__(self, share: Share) -> None:
        self._share = share

    async def domains(self) -> Sequence[str]:
        label = self._share.label
        with _asking():
            nodes = await asyncio.to_thread(ray.nodes)
        able = [one for one in nodes if one["Alive"] and one["Resources"].get("CPU")]
        return list(dict.fromkeys(one["Labels"].get(label, "") for one in able))

    async def place(
        self, name: str, domain: str | None, avoid: Collection[str], wait_s: float | None
    ) -> str:
        label = self._share.label
        selector = {label: domain} if domain else {}
        named = sorted(filter(None, avoid))  # nodes without the label are one domain, too
        if domain is None and named:
            selector = {label: f"!in({','.join(named)})"}
        bundles = [self._share.bundle]
        try:
            with _asking():
                group = placement_group(
                    bundles, name=name, lifetime="detached", bundle_label_selector=[selector]
                )
                async with asyncio.timeout(wait_s):
                    while not _is_placed(group):  # noqa: ASYNC110  # Ray tells nobody
                        await asyncio.sleep(_PLACED_S)
                return domain or self._domain_of(group)
        except TimeoutError:
            await self.release(name)
            raise NoRoom(domain or "any") from None

    async def host(self, job: Job) -> Hosted:
        share = self._share
        with _asking():
            group = get_placement_group(job.name)
            actor = (
                ray.remote(_Host)
                .options(
                    name=job.name,
                    lifetime="detached",
                    num_cpus=share.cpus,
                    num_gpus=share.gpus,
                    resources=dict(share.resources),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group),
                )
                .remote(job)
            )
        return RayReplica(actor)

    async def release(self, name: str) -> None:
        with contextlib.suppress(Lost), _asking():
            await asyncio.to_thread(remove_placement_group, get_placement_group(name))

    async def adopt(self) -> Mapping[str, tuple[str, Hosted]]:
        found: dict[str, tuple[str, Hosted]] = {}
        for name in await asyncio.to_thread(ray.util.list_named_actors):
            with contextlib.suppress(Lost), _asking():
                own = get_placement_group(name)
                found[name] = (self._domain_of(own), RayReplica(ray.get_actor(name)))
        for group in (await asyncio.to_thread(placement_group_table)).values():
            if group["name"] not in found:  # it ended between taking room and using it
                await self.release(group["name"])
        return found

    def _domain_of(self, group: PlacementGroup) -> str:
        (node,) = placement_group_table(group)["bundles_to_node_id"].values()
        labels = {one["NodeID"]: one["Labels"] for one in ray.nodes()}
        return str(labels.get(node, {}).get(self._share.label, ""))


class RayReplica:
    """The handle of an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def start(self) -> str:
        url, why, refused = await self._ask(self._actor.start.remote(), None)
        if why is not None:
            raise Lost(why, refused=refused)
        return str(url)

    async def look(self) -> Look:
        look: Look = await self._ask(self._actor.look.remote(), _LOOK_S)
        return look

    async def stop(self) -> None:
        with contextlib.suppress(Lost, Unheard):
            await self._ask(self._actor.stop.remote(), None)

    async def _ask(self, answer: Any, wait_s: float | None) -> Any:
        try:
            with _asking():
                async with asyncio.timeout(wait_s):
                    return await answer
        except TimeoutError:
            raise Unheard(f"its actor does not answer within {wait_s:g} s") from None


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Ray's words for what is gone or does not answer, as ours. Raises Lost, Unheard."""
    try:
        yield
    except ActorUnavailableError as error:
        raise Unheard(_shortly(error)) from None
    except (RayError, ValueError) as error:  # ValueError: there is none of that name
        raise Lost(_shortly(error)) from None


class _Host:
    """The actor: a replica, and its end when nobody looks any more."""

    def __init__(self, job: Job) -> None:
        self._replica = Replica(job, ray.util.get_node_ip_address())
        self._starting: asyncio.Task[str] | None = None
        self._lease: asyncio.Task[None] | None = None

    async def start(self) -> tuple[str | None, str | None, bool]:
        """URL, or why there is none and whether there would be none the next time; the same for
        whoever asks again."""
        self._lease = self._lease or asyncio.create_task(self._watch())
        self._starting = self._starting or asyncio.create_task(self._replica.start())
        try:
            return await asyncio.shield(self._starting), None, False
        except Lost as lost:  # an exception would come with this node's traceback
            return None, str(lost), lost.refused

    async def look(self) -> Look:
        return await self._replica.look()

    async def stop(self) -> None:
        await self._replica.stop()

    async def _watch(self) -> None:
        while not self._replica.abandoned:  # noqa: ASYNC110  # time passes, nothing tells of it
            await asyncio.sleep(_LEASE_LOOK_S)
        await self._replica.stop()
        group = get_current_placement_group()
        assert group is not None, "a replica is put into a group of its own"
        remove_placement_group(group)  # and with it this actor


def _is_placed(group: PlacementGroup) -> bool:
    return bool(placement_group_table(group)["state"] == "CREATED")


def _shortly(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
