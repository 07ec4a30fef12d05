"""The gateway as an ASGI application: routes and lifespan, nothing else.

No layer stands around `send`, where it would cost on every chunk; the doorway looks once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from starlette.routing import Route, Router
from starlette.types import ASGIApp

from gateway.admin import routes as admin_routes
from gateway.call import CHAT_PATH, COMPLETIONS_PATH
from gateway.chat import Completions
from gateway.console import routes as console_routes
from gateway.doorway import Doorway
from gateway.drains import Drains
from gateway.edge import Live
from gateway.history import History
from gateway.kept import Kept
from gateway.overview import routes as overview_routes
from gateway.processes import Processes
from gateway.reload import Reload
from gateway.scrape import Scrape
from gateway.status import (
    Allowed,
    fingerprints,
    health,
    model,
    models,
    openapi,
    receipt,
    receipts,
    unknown_path,
)
from gateway.variants import Variants


def create_app(
    live: Live,
    reload: Reload | None = None,
    variants: Variants | None = None,
    drains: Drains | None = None,
) -> ASGIApp:
    """Serves by the edge that is current; its probes and connections live as long as the app, and
    so does what replaces it."""
    variants = variants or Variants(live)
    history = History(live, variants.told)
    kept = Kept(live, lambda: variants.edge)
    drains = drains or Drains(live, lambda: variants.edge)

    @asynccontextmanager
    async def lifespan(_app: Router) -> AsyncIterator[None]:
        watching = reload.running() if reload else nullcontext()
        async with (
            live.running(),
            drains.following(),
            watching,
            variants.following(),
            history.sampling(),
        ):
            yield

    routes = [
        Route("/health", Allowed("GET", health(live, Processes(live)))),
        Route("/openapi.json", Allowed("GET", openapi(live))),
        Route("/metrics", Allowed("GET", Scrape(live, variants.told))),
        Route("/v1/fingerprint", Allowed("GET", fingerprints(live))),
        Route("/v1/receipts", Allowed("GET", receipts(kept))),
        Route("/v1/receipts/{id:path}", Allowed("GET", receipt(live, kept))),
        Route("/v1/models", Allowed("GET", models(live))),
        Route("/v1/models/{model:path}", Allowed("GET", model(live))),
        *admin_routes(live, variants, kept, drains),
        *overview_routes(live, variants, history, kept),
        *console_routes(),
    ]
    router = Router(routes, default=unknown_path, redirect_slashes=False, lifespan=lifespan)
    busiest = {
        path: Allowed("POST", Completions(path, live)) for path in (CHAT_PATH, COMPLETIONS_PATH)
    }
    return Doorway(router, live, busiest)
