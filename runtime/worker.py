"""One model in one process: loading, served, ending. Its engine has a thread of its own.

Knows the engine's life and what health answers say; knows no requests.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette

from cache.tokens import Tokenizer
from policies.tracing import Tracing
from runtime.engine import Engine
from runtime.events import BlockEvents
from runtime.fingerprint import Fingerprint
from runtime.metrics_page import Page
from runtime.streams import Streams
from runtime.tracing import Tracer
from runtime.wire import Problem


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model, ready to serve."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    facts: dict[str, Any]  # device, dtype, parameters, ...: shown by /health
    created: int
    fingerprint: Fingerprint
    metrics: Page
    events: BlockEvents | None = None
    sampling: dict[str, float] = field(default_factory=dict)  # what the model's makers recommend
    optimizations: Sequence[Mapping[str, Any]] = ()  # of the policy, and which of them are on


class Worker:
    """One model being loaded, served, or drained in this process."""

    def __init__(
        self,
        load: Callable[[Streams], Served],
        *,
        max_body_bytes: int,
        on_failure: Callable[[BaseException], None],
        run_token: str | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._load = load
        self._on_failure = on_failure
        self.max_body_bytes = max_body_bytes
        self.run_token = run_token
        self.tracer = tracer or Tracer(Tracing())
        self.served: Served | None = None

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.streams = Streams(self._loop)
        thread = threading.Thread(target=self._work, name="engine", daemon=True)
        thread.start()
        yield
        if self.served is not None:
            self.served.engine.stop()
            await asyncio.to_thread(thread.join, 10.0)
        await asyncio.to_thread(self.tracer.close)

    def _work(self) -> None:
        """The engine's thread, from loading to the end. A failure here ends the process, loudly."""
        try:
            served = self._load(self.streams)
            self._loop.call_soon_threadsafe(self._is_ready, served)
            served.engine.run()
            if served.events is not None:
                served.events.close()
        except BaseException as error:  # noqa: BLE001 - reported, then the process ends
            self._on_failure(error)

    def _is_ready(self, served: Served) -> None:
        self.served = served

    def require(self) -> Served:
        if self.served is None:
            raise Problem(
                503,
                "the model is still loading; try again in a moment",
                code="loading",
                headers={"retry-after": "1"},
            )
        return self.served

    def health(self) -> tuple[int, dict[str, Any]]:
        if self.served is None:
            return 503, {"status": "loading"}
        load, swap = self.served.engine.load(), self.served.engine.swap
        blocks = load.blocks
        body = {
            "status": "ready",
            "model": self.served.name,
            **self.served.facts,
            "running": load.running,
            "waiting": load.waiting,
            "streams": len(self.streams),
            "preemptions": load.preemptions,
            "prompt_tokens": load.prompt_tokens,
            "cached_tokens": load.cached_tokens,
            "hit_tokens": dict(load.hit_tokens),
            "blocks": {
                "total": blocks.total,
                "free": blocks.free,
                "cached": blocks.cached,
                "in_use": blocks.in_use,
            },
            "tiers": None if swap is None else swap.report(),
        }
        if self.served.events is not None:
            body["kv_events"] = self.served.events.facts()
        return 200, body
