"""The gateway as an ASGI application: routes and lifespan, nothing else.

No layer stands around `send`, where it would cost on every chunk; the doorway looks once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.routing import Route, Router
from starlette.types import ASGIApp

from gateway.call import CHAT_PATH, COMPLETIONS_PATH
from gateway.chat import Completions
from gateway.doorway import Doorway
from gateway.status import Allowed, fingerprints, health, model, models, unknown_path
from gateway.upstream import Pool


def create_app(pool: Pool) -> ASGIApp:
    """Serves the replicas of `pool`, whose probes and connections live as long as the app."""

    @asynccontextmanager
    async def lifespan(_app: Router) -> AsyncIterator[None]:
        async with pool:
            yield

    routes = [
        Route(CHAT_PATH, Allowed("POST", Completions(CHAT_PATH, pool))),
        Route(COMPLETIONS_PATH, Allowed("POST", Completions(COMPLETIONS_PATH, pool))),
        Route("/health", Allowed("GET", health(pool))),
        Route("/v1/fingerprint", Allowed("GET", fingerprints(pool))),
        Route("/v1/models", Allowed("GET", models(pool))),
        Route("/v1/models/{model:path}", Allowed("GET", model(pool))),
    ]
    router = Router(routes, default=unknown_path, redirect_slashes=False, lifespan=lifespan)
    return Doorway(router, pool.settings.host)
