"""A policy file that is read again while requests run: whole, or not at all.

Knows the file and what may not change at run time. A policy that is wrong, that changes what is
fixed, or none of whose replicas answers while others do, changes nothing and is told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway.edge import Edge, Live, build
from gateway.replica import Replica, replicas_of
from policies import as_started
from policies.as_started import reading
from policies.enabling import Gated, gated, rows
from policies.load import (
    FLEET_KEY_ENV,
    PolicyError,
    key_problems,
    load_whole,
    own_tokenizer,
    package_problems,
    resolve_discovery,
    resolve_recording,
    resolve_tokenizers,
    with_environment,
)
from policies.schema import Deployment, Discovery, Gateway

log = logging.getLogger("headgate.gateway")

LOOK_S = 1.0  # between looks at the file
FLEET_LOOK_S = 0.5  # at the list of our own workers that come and go
READY_S = 10.0  # for a first replica of the new policy to answer
# Known to the supervisor, to the workers or to the listening socket, which go on as they began.
FIXED = ("runtime", "gateway.host", "gateway.port", "gateway.processes", "gateway.store",
         "gateway.drain_s", "tracing")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a gateway's policy and replicas come from, at its start and later."""

    file: Path
    workers: Sequence[str] = ()
    alone: bool = True  # one process on its port, whatever the policy says
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    fleet: Path | None = None  # where workers of our own that come and go are listed

    def gated(self) -> Gated:
        """The file's policy, as far as it may be served. Raises PolicyError."""
        return self.gated_beside(None)[0]

    def gated_beside(self, serving: Gated | None) -> tuple[Gated, bytes]:
        """The same beside what is served, and what the file says. Raises PolicyError."""
        said = load_whole(self.file)
        found = gated(self.file, said.deployment, time.time(), serving=serving, data=said.data)
        return found, said.body

    def read(self, found: Gated | None = None) -> tuple[Deployment, list[Replica]]:
        """By what may be served of the file. Raises PolicyError."""
        may = (found or self.gated()).deployment
        policy = resolve_discovery(self.file, with_environment(may, self.environ))
        problems = key_problems(self.file, policy, self.environ)
        if problems := [*problems, *package_problems(self.file, policy)]:
            raise PolicyError(*problems)
        if self.alone:
            gateway = policy.gateway.model_copy(update={"processes": 1})
            policy = policy.model_copy(update={"gateway": gateway})
        policy = resolve_tokenizers(self.file, resolve_recording(self.file, policy))
        own = self.workers or self.fleet
        tokenizer = own_tokenizer(self.file, policy) if own else None
        if self.fleet is not None:
            sources = (*policy.discovery, fleet_source(self.fleet, tokenizer))
            policy = policy.model_copy(update={"discovery": sources})
        return policy, replicas_of(policy, self.workers, self.environ, tokenizer)


def fleet_source(file: Path, tokenizer: Path | None) -> Discovery:
    """Where workers of our own that come and go are found."""
    return Discovery(
        file=str(file.absolute()),
        every_s=FLEET_LOOK_S,
        kind="headgate",
        api_key_env=FLEET_KEY_ENV,
        tokenizer=str(tokenizer) if tokenizer else None,
    )


class Refused(Exception):
    """A policy that is valid and yet cannot take the place of the one that serves."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a gateway process begins by."""

    gated: Gated
    policy: Deployment
    replicas: Sequence[Replica]
    refused: str | None = None  # why it is not the file that it was given


def begin(origin: Origin, started: Path | None = None) -> Beginning:
    """The file as it is; of a run whose file has been edited since into what only a restart of all
    can change, or into nothing valid, the copy of what that run was `started` with, or has taken
    last: a key that was withdrawn while it ran stays so.

    Raises PolicyError.
    """
    if started is None:
        return _as_it_is(origin)
    with reading(origin.file, started):
        first = _as_it_is(origin)
    try:
        now = _as_it_is(origin)
        refuse_fixed(first.policy, now.policy)
    except (PolicyError, Refused) as error:
        return replace(first, refused=str(error))
    return now


def _as_it_is(origin: Origin) -> Beginning:
    found = origin.gated()
    return Beginning(found, *origin.read(found))


class Reload:
    """Replaces the edge by what the file says: at SIGHUP, and when the file changes."""

    def __init__(
        self,
        origin: Origin,
        live: Live,
        adopt: Callable[[Gateway], None] = lambda _settings: None,
        started: Path | None = None,
    ) -> None:
        """`adopt` is told the settings that serve from now on; `started`: the copy that says what
        a process begins by that is started later."""
        self.origin = origin
        self.live = live
        self.ready_s = READY_S
        self._adopt = adopt
        self._started = started
        self._one_at_a_time = asyncio.Lock()
        self._asked = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch())
        hangs_up = not (sys.stdin and sys.stdin.isatty())  # there SIGHUP means: end
        loop = asyncio.get_running_loop()
        if hangs_up:
            loop.add_signal_handler(signal.SIGHUP, self._asked.set)
        try:
            yield
        finally:
            if hangs_up:
                loop.remove_signal_handler(signal.SIGHUP)
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def reload(self) -> bool:
        """Whether the file's policy serves now; why not is in the log and in /health."""
        async with self._one_at_a_time:
            try:
                found, text = await asyncio.to_thread(self.origin.gated_beside, self.live.gated)
                policy, replicas = await asyncio.to_thread(self.origin.read, found)
                refuse_fixed(self.live.edge.policy, policy)
                await self._replace(policy, replicas)
            except (PolicyError, Refused) as error:
                self.live.refused = str(error)
                log.warning("the policy was not reloaded, nothing has changed: %s", error)
                return False
            before = self.live.gated
            self.live.gated = found
            self.live.refused = None
            self.live.reloads += 1
            self._adopt(policy.gateway)
            await asyncio.to_thread(self._keep, text)
            log.warning("the policy was reloaded from %s", self.origin.file)
            if before is None or before.states != found.states:
                for row in rows(found):
                    log.warning("%s: %s  %s", *row)
            return True

    def _keep(self, text: bytes) -> None:
        if self._started is None:
            return
        try:
            as_started.taken(text, self._started)
        except OSError as error:
            log.warning("a process that is started anew may begin by an older policy: %s", error)

    async def _replace(self, policy: Deployment, replicas: Sequence[Replica]) -> None:
        """Raises Refused where none of the new policy's replicas takes requests, and one does now.

        Replicas that stay are the same objects in both edges: until the new one serves, they go by
        what the old policy says of them.
        """
        old = self.live.edge
        serves = any(one.healthy and not one.spared for one in old.pool.replicas)
        before = [(replica, replace(replica)) for replica in old.pool.replicas]
        edge = build(policy, replicas, old)
        after = [(replica, replace(replica)) for replica, _ in before]
        drained = {replica for replica, wanted in after if wanted.spared}
        for replica, was in before:
            replica.adopt(was, old.settings.breaker)

        def takes_requests() -> bool:
            return any(one.healthy and one not in drained for one in edge.pool.replicas)

        async def is_ready(edge: Edge) -> None:
            try:
                async with asyncio.timeout(self.ready_s):
                    while serves and not takes_requests():  # noqa: ASYNC110  # probes tell nobody
                        await asyncio.sleep(0.05)
            except TimeoutError:
                states = "; ".join(replica.state() for replica in edge.pool.replicas)
                raise Refused(f"none of its replicas takes requests: {states}") from None
            for replica, wanted in after:
                if replica in edge.pool.replicas:
                    replica.adopt(wanted, edge.settings.breaker)

        await self.live.replace(edge, is_ready)

    async def _watch(self) -> None:
        served = seen = await asyncio.to_thread(_mark, self.origin.file)
        while True:
            asked = await self._pause()
            now = await asyncio.to_thread(_mark, self.origin.file)
            watches = self.live.edge.settings.reload == "watch"
            # A file that is still being written changes from look to look.
            if asked or (watches and now is not None and now == seen and now != served):
                served = now
                await self.reload()
            seen = now

    async def _pause(self) -> bool:
        """Until it is asked for (True) or time to look again."""
        try:
            async with asyncio.timeout(LOOK_S):
                await self._asked.wait()
        except TimeoutError:
            return False
        self._asked.clear()
        return True


def refuse_fixed(old: Deployment, new: Deployment) -> None:
    """Raises Refused for what only a restart can change."""
    before, after = old.model_dump(), new.model_dump()
    changed = [
        path for part in FIXED for path in differences(_at(before, part), _at(after, part), part)
    ]
    if changed:
        raise Refused(
            f"{', '.join(changed[:8])} cannot change while it runs: restart `headgate serve`, "
            "or take the change back"
        )


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """The deepest fields in which two policies differ, dotted."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() | new.keys():
            yield from differences(old.get(name), new.get(name), f"{path}.{name}")
    elif old != new:
        yield path


def _at(policy: Mapping[str, Any], path: str) -> Any:
    value: Any = policy
    for name in path.split("."):
        value = value[name]
    return value


def _mark(file: Path) -> tuple[int, ...] | None:
    """What changes with the file's content; None when there is no file."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
