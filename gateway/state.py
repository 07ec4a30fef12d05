"""What this gateway shares with others: its store by the policy, and how that is doing.

Knows where the store is and with how many processes it is shared; what is kept in it is known by
those who keep it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.failover import FailoverStore
from cache.memory_store import MemoryStore
from cache.prefix_index import PrefixIndex
from cache.store import Store
from gateway.others import Others
from gateway.replica import Replica
from gateway.siblings import Siblings
from policies.schema import Gateway, StateStore


@dataclass(frozen=True, slots=True)
class State:
    """The store of a gateway process, and who shares it. Outlives policies."""

    store: Store
    far: FailoverStore | None = None  # the same store, where it is elsewhere
    others: Others | None = None
    siblings: Siblings | None = None  # processes beside this one that can be asked

    def processes(self, settings: Gateway) -> int:
        """As far as is known, how many gateway processes serve together, this one included."""
        return max(settings.processes, self.far.peers if self.far is not None else 1)

    def begin(self) -> None:
        """A request begins: what it may wait for the store counts from here."""
        if self.far is not None:
            self.far.begin()

    @asynccontextmanager
    async def running(
        self, replicas: Callable[[], Iterable[Replica]], index: PrefixIndex
    ) -> AsyncIterator[None]:
        """Shares with the other gateways meanwhile, where there are any to share with."""
        async with AsyncExitStack() as parts:
            if self.siblings is not None:
                await parts.enter_async_context(self.siblings.listening())
            if self.far is not None and self.others is not None:
                await parts.enter_async_context(self.far.running())
                await parts.enter_async_context(self.others.exchanging(replicas, index))
            yield

    def sent(self, replica: str, hashes: Sequence[bytes], known: int = 0) -> None:
        """A request with these blocks went there, which this gateway's index knew `known` of to be
        there: other gateways are told."""
        if self.others is not None:
            self.others.placed(replica, hashes, known)

    def health(self) -> Mapping[str, Any]:
        """For /health."""
        if self.far is None:
            return {"store": "memory"}
        health = {
            "store": "redis" if self.far.up else "local",
            "outages": self.far.outages,
            "processes": self.far.peers,
        }
        return health if self.far.error is None else {**health, "error": self.far.error}


def open_state(settings: Gateway, environ: Mapping[str, str], folder: Path) -> State:
    """The state by a policy whose file lies in `folder`; connects to nothing yet.

    Raises KeyError for a password that is not set.
    """
    if settings.store is None:
        return in_memory(settings)
    far = FailoverStore(
        _redis(settings.store, environ, folder),
        when_down=settings.store.when_down,
        patience_s=settings.store.timeout_ms / 1000,
    )
    far.peers = settings.processes
    return State(far, far, Others(far, process=secrets.token_hex(8)))


def in_memory(settings: Gateway) -> State:
    """What one process knows by itself, which gives its share of every limit."""
    return State(MemoryStore(among=settings.processes))


def _redis(wanted: StateStore, environ: Mapping[str, str], folder: Path) -> Store:
    from cache.redis_store import RedisStore

    password = None
    if wanted.password_env is not None:
        password = environ[wanted.password_env]
        if not password:
            raise KeyError(wanted.password_env)
    return RedisStore(
        wanted.redis,
        password=password,
        ca_file=str(folder / wanted.ca_file) if wanted.ca_file is not None else None,
        namespace=wanted.namespace,
        timeout_s=wanted.timeout_ms / 1000,
        clock=time.time,
    )
