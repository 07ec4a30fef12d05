"""Follows the KV-cache events of all replicas that publish them, as long as any edge serves.

Knows which replicas there are, where they publish, and when what they told is worth nothing: when
they are not well, and when they do other than they told. Sockets are kv_follower.py's, which is
loaded once a replica publishes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from cache.blocks import BLOCK_TOKENS
from cache.prefix_index import Mode, PrefixIndex
from gateway.prompt import root
from gateway.replica import Replica

if TYPE_CHECKING:
    import zmq

    from gateway.kv_follower import Follower
    from gateway.upstream import Pool

LOOK_S = 0.25  # between looks at the replicas' health
CONTRADICTIONS_MAX = 4  # in a row, from which on a replica's events are doubted


@dataclass(frozen=True, slots=True)
class Where:
    """Where one publisher publishes; `bind`: it connects to us there."""

    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""
    bind: bool = False

    def of_rank(self, rank: int) -> Where:
        """Rank r of a data-parallel server takes the ports r above, as in vLLM."""
        replay = self.replay_endpoint
        replay = None if replay is None else _above(replay, rank)
        return Where(_above(self.endpoint, rank), replay, self.topic, self.bind)


def _above(endpoint: str, rank: int) -> str:
    head, _, port = endpoint.rpartition(":")
    if endpoint.startswith("tcp:"):
        return f"{head}:{int(port) + rank}"
    return f"{endpoint}_dp{rank}" if rank else endpoint


@dataclass(slots=True)
class Followed:
    """One replica that publishes: where, its model, and a follower for each rank."""

    where: Where
    model: str
    followers: list[Follower]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    contradictions: int = 0  # in a row

    def stop(self) -> None:
        for task in self.tasks:
            task.cancel()


class KvEvents:
    """Keeps the index up to date. One for all edges, so that nothing is read twice."""

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self._pools: list[Pool] = []  # of edges, the latest one last
        self._followed: dict[str, Followed] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._looks: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def following(self, pool: Pool) -> AsyncIterator[None]:
        """For one edge's life; what was learned stays for the next."""
        self._pools.append(pool)
        if self._looks is None:
            self._looks = asyncio.create_task(self._look())
        try:
            yield
        finally:
            self._pools.remove(pool)
            if not self._pools:
                await self._end()

    async def _end(self) -> None:
        tasks = [task for one in self._followed.values() for task in one.tasks]
        if self._looks is not None:
            tasks.append(self._looks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._followed.clear()
        self._looks = None
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    # ---- which are followed ----------------------------------------------------------------------

    async def _look(self) -> None:
        while True:
            there = {
                replica.url: replica
                for pool in self._pools  # one that is tried, and one that goes on, too
                for replica in pool.replicas
            }
            for url in {*self.index.replicas(), *self._followed}:
                if url not in there:
                    self._leave(str(url))
            for replica in there.values():
                self._look_at(replica)
            await asyncio.sleep(LOOK_S)

    def _look_at(self, replica: Replica) -> None:
        """Begins and ends to follow a replica as it comes and goes."""
        if not replica.healthy:
            self._leave(replica.url)
            return
        if (blocks := _blocks(replica)) is not None:
            self.index.limit(replica.url, blocks)
        published = published_by(replica)
        followed = self._followed.get(replica.url)
        if published is None:
            if followed is not None:
                self._leave(replica.url)
            return
        where, ranks = published
        model = base_model(replica.models)
        if followed is not None:
            if (followed.where, followed.model, len(followed.followers)) == (where, model, ranks):
                return
            self._leave(replica.url)
        self._followed[replica.url] = self._follow(replica.url, where, ranks, model)

    def _leave(self, url: str) -> None:
        """Nothing is known any more of what it has."""
        followed = self._followed.pop(url, None)
        if followed is not None:
            followed.stop()
        self.index.forget(url)

    def _follow(self, url: str, where: Where, ranks: int, model: str) -> Followed:
        import zmq  # only where a replica publishes

        from gateway.kv_follower import Follower
        from gateway.kv_source import Source

        if self._context is None:
            self._context = zmq.Context()
        clock = asyncio.get_running_loop().time
        replays = where.replay_endpoint is not None
        followers = []
        for rank in range(ranks):
            source = Source(
                self.index, url, rank, partial(root, model), replays=replays, clock=clock
            )
            changed = partial(self._changed, url)
            followers.append(Follower(source, where.of_rank(rank), self._context, changed))
        tasks = [asyncio.create_task(follower.run()) for follower in followers]
        return Followed(where, model, followers, tasks)

    def _changed(self, url: str) -> None:
        if (followed := self._followed.get(url)) is not None:
            self.index.trust(url, mode_of([one.source.mode for one in followed.followers]))

    # ---- whether what they told is true ----------------------------------------------------------

    def delivered(self, url: str, told_blocks: int, found_blocks: int, cached_tokens: int) -> None:
        """A replica found `cached_tokens` of a prompt in its cache, when the index knew of
        `found_blocks` leading ones, `told_blocks` of them from itself and in its pool.

        Other counts again and again are no coincidence: its events are read again.
        """
        followed = self._followed.get(url)
        if followed is None or self.index.mode(url) is not Mode.EXACT:
            return
        blocks = cached_tokens // BLOCK_TOKENS
        # The last block of a prompt that is there whole is computed again.
        if told_blocks - 1 <= blocks <= found_blocks + 1:
            followed.contradictions = 0
            return
        followed.contradictions += 1
        if followed.contradictions >= CONTRADICTIONS_MAX:
            followed.contradictions = 0
            for follower in followed.followers:
                follower.doubt()

    def facts(self, url: str) -> Mapping[str, object]:
        """For health answers: how the replica's blocks are known."""
        followed = self._followed.get(url)
        ranks = [one.facts() for one in followed.followers] if followed else []
        return {**self.index.report(url), "events": ranks}


def mode_of(modes: Sequence[Mode]) -> Mode:
    """Of a replica by those of its ranks."""
    if all(mode is Mode.EXACT for mode in modes):
        return Mode.EXACT
    if all(mode is Mode.APPROXIMATE for mode in modes):
        return Mode.APPROXIMATE
    return Mode.DEGRADED


def published_by(replica: Replica) -> tuple[Where, int] | None:
    """Where a replica publishes, and its ranks: an own worker tells it, else the policy.

    None, too, where prompts are not read exactly: what it tells of tokens says nothing of them.
    """
    if replica.tokenizer is None:
        return None
    if replica.own:
        told = replica.facts.get("kv_events")
        if not isinstance(told, dict) or not isinstance(told.get("endpoint"), str):
            return None
        return Where(told["endpoint"], told.get("replay_endpoint"), told.get("topic") or ""), 1
    if (at := replica.publishes) is None:
        return None
    return Where(at.endpoint, at.replay_endpoint, at.topic, at.bind), at.ranks


def base_model(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The model that adapters are put on: the first one that names no parent."""
    return next((name for name, entry in models.items() if not entry.get("parent")), "")


def _blocks(replica: Replica) -> int | None:
    blocks = replica.facts.get("blocks")
    total = blocks.get("total") if isinstance(blocks, dict) else None
    return total if isinstance(total, int) and total > 0 else None
