"""What this gateway shares with others: its store by the policy, and how that is doing.

Knows where the store is and with how many processes it is shared; what is kept in it is known by
those who keep it.
"""

from __future__ import annotations

import importlib.util
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.failover import FailoverStore
from cache.memory_store import MemoryStore
from cache.store import Store
from policies.schema import Gateway, StateStore


class StoreMissing(Exception):
    """The policy names a store that cannot be used here; the text says what to do."""


@dataclass(frozen=True, slots=True)
class State:
    """The store of a gateway process, and the process's own name in it. Outlives policies."""

    store: Store
    process: str
    far: FailoverStore | None = None  # the same store, where it is elsewhere

    def begin(self) -> None:
        """A request begins: what it may wait for the store counts from here."""
        if self.far is not None:
            self.far.begin()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        if self.far is None:
            yield
        else:
            async with self.far.running():
                yield

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

    Raises StoreMissing, and KeyError for a password that is not set.
    """
    if settings.store is None:
        return in_memory(settings)
    far = FailoverStore(
        _redis(settings.store, environ, folder),
        when_down=settings.store.when_down,
        patience_s=settings.store.timeout_ms / 1000,
    )
    far.peers = settings.processes
    return State(far, secrets.token_hex(8), far)


def in_memory(settings: Gateway) -> State:
    """What one process knows by itself, which gives its share of every limit."""
    return State(MemoryStore(among=settings.processes), secrets.token_hex(8))


def _redis(wanted: StateStore, environ: Mapping[str, str], folder: Path) -> Store:
    if importlib.util.find_spec("redis") is None:
        raise StoreMissing(
            "gateway.store needs the package redis, which is not installed: "
            "pip install 'headgate[redis]'"
        )
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
