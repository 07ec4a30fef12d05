"""What the gateway answers by itself: health, models, fingerprints, that a path leads nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import problems
from gateway.call import request_id
from gateway.doorway import refuse
from gateway.edge import Live
from gateway.kept import Kept
from gateway.keys import TENANT
from gateway.openapi import document
from gateway.processes import Processes, status_of
from gateway.replica import Replica
from gateway.reply import Reply
from gateway.upstream import Pool
from policies.leaves import edge_facts, edge_source
from policies.side import Side
from runtime.wire import Problem

Answer = tuple[int, Mapping[str, Any]]


class Allowed:
    """One path's application behind its one method; GET allows HEAD."""

    def __init__(self, method: str, app: ASGIApp) -> None:
        self._method = method
        self._methods = ("GET", "HEAD") if method == "GET" else (method,)
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in self._methods:
            await self._app(scope, receive, send)
            return
        problem = problems.wrong_method(scope["method"], scope["path"], ", ".join(self._methods))
        await refuse(scope, send, problem)


async def unknown_path(scope: Scope, _receive: Receive, send: Send) -> None:
    """Whatever no route matches, WebSockets included (which the server has turned off)."""
    if scope["type"] == "http":
        await refuse(scope, send, problems.unknown_path(scope["path"]))


def health(live: Live, processes: Processes) -> ASGIApp:
    """200 when any replica can take requests of this process, else 503; both with the state of each
    replica, and of several processes behind one port with how each is.

    Without a key, where one is needed, it tells no more than that.
    """

    async def answer(scope: Scope) -> Answer:
        edge = live.edge
        pool = edge.pool
        now = asyncio.get_running_loop().time()
        status = status_of(pool)
        code = 200 if status == "ready" else 503
        if scope["extensions"][TENANT] is None:
            shortly = [{"healthy": replica.healthy} for replica in pool.replicas]
            return code, {"status": status, "replicas": shortly}
        replicas = [
            _state(replica, now) | {"kv_cache": edge.events.facts(replica.url)}
            for replica in pool.replicas
        ]
        payload = {
            "status": status,
            **await processes.told(),
            "in_flight": pool.in_flight,
            "replicas": replicas,
            "queues": edge.admission.health(),
            "state": edge.state.health(),
            "policy": {"reloads": live.reloads, "edges": live.count, "refused": live.refused},
            "cached_tokens": edge.ladder.report(),
            "known_blocks": len(edge.index),
            "routing": edge.routing.report(),
            "prompts": edge.prompts.report(),
        }
        if not edge.settings.trim.off:
            payload["trim"] = edge.shortener.totals.told()
        if edge.answers is not None:
            payload["response_cache"] = edge.answers.told()
        if edge.recorder is not None:
            payload["record"] = edge.recorder.told()
        return code, payload

    return _as_json(answer)


def _state(replica: Replica, now: float) -> dict[str, Any]:
    return {
        "url": replica.url,
        "kind": replica.kind,
        "healthy": replica.healthy,
        "draining": replica.spared,
        "circuit": replica.circuit.state(now),
        "weight": replica.weight,
        "models": list(replica.models),
        "in_flight": replica.in_flight,
        "error": replica.error,
    }


def openapi(live: Live) -> ASGIApp:
    """What is served here, as OpenAPI."""

    async def answer(_scope: Scope) -> Answer:
        edge = live.edge
        models = sorted(_served(edge.pool))
        return 200, document(edge.settings.tiers, models, keys=edge.keys.required)

    return _as_json(answer)


def models(live: Live) -> ASGIApp:
    """The union over healthy replicas, as OpenAI lists models."""

    async def answer(_scope: Scope) -> Answer:
        return 200, {"object": "list", "data": list(_served(live.edge.pool).values())}

    return _as_json(answer)


def model(live: Live) -> ASGIApp:
    """One entry of that list."""

    async def answer(scope: Scope) -> Answer:
        name = scope["path_params"]["model"]
        pool = live.edge.pool
        served = _served(pool)
        if name not in served:
            raise problems.model_not_found(name, sorted(served), _down(pool))
        return 200, served[name]

    return _as_json(answer)


def receipt(live: Live, kept: Kept) -> ASGIApp:
    """Why one request went where it went; to its tenant alone, where there are keys."""

    async def answer(scope: Scope) -> Answer:
        name = scope["path_params"]["id"]
        found, by = await kept.receipt(name, scope["extensions"][TENANT].name)
        if found is None:
            most = live.edge.settings.routing.receipts
            raise problems.receipt_not_found(name, most, by.where())
        return 200, found

    return _as_json(answer)


def receipts(kept: Kept) -> ASGIApp:
    """All receipts of the tenant that are still kept, the earliest first."""

    async def answer(scope: Scope) -> Answer:
        found, by = await kept.receipts(scope["extensions"][TENANT].name)
        return 200, {"object": "list", "data": found, "processes": by.payload()}

    return _as_json(answer)


def fingerprints(live: Live) -> ASGIApp:
    """What each replica answers at the same path, null for one that is down or has none; what this
    gateway does by its policy; and which optimizations are on, or why not."""
    source = edge_source()  # as it is now that it runs, whatever becomes of the files

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        pool = live.edge.pool
        found = await pool.ask_all("/v1/fingerprint")
        data = [
            {"url": replica.url, "fingerprint": fingerprint}
            for replica, fingerprint in zip(pool.replicas, found, strict=True)
        ]
        told: dict[str, Any] = {"object": "list", "data": data}
        if (gated := live.gated) is not None:
            leaves = Side.of(edge_facts(gated.file.parent, gated.deployment, source)).leaves
            told |= {"gateway": {"leaves": leaves}, "optimizations": gated.payload()}
        body = orjson.dumps(told)
        reply = Reply(send, request_id(scope["headers"]))
        await reply.whole(200, [(b"content-type", b"application/json")], body)

    return app


def _served(pool: Pool) -> dict[str, Mapping[str, Any]]:
    """Model id -> entry; the first replica that serves it describes it."""
    served: dict[str, Mapping[str, Any]] = {}
    for replica in pool.replicas:
        if replica.healthy:
            served = {**replica.models, **served}
    return served


def _down(pool: Pool) -> list[str]:
    return [replica.state() for replica in pool.replicas if not replica.healthy]


def _as_json(answer: Callable[[Scope], Awaitable[Answer]]) -> ASGIApp:
    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        reply = Reply(send, request_id(scope["headers"]))
        try:
            status, payload = await answer(scope)
        except Problem as problem:
            await reply.fail(problem)
            return
        headers = [(b"content-type", b"application/json")]
        await reply.whole(status, headers, orjson.dumps(payload))

    return app
