"""The paths by which a rollout is steered and watched, and replicas are drained, for who may:
`/admin/...`.

Knows bodies and who may send them; what follows is that of variants.py and by_hand.py. Nothing here
is on the way of a client's request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway import problems
from gateway.bodies import Ending, Pausing, Renewed, Wanted
from gateway.by_hand import ByHand
from gateway.call import ClientGone, read_body, request_id
from gateway.candidate import check_key, patched
from gateway.drains import Drains
from gateway.edge import Live
from gateway.kept import Kept
from gateway.keys import refuse_stranger
from gateway.listener import OUTGOING
from gateway.orders import Orders
from gateway.query import cursor, number, query
from gateway.reply import Reply
from gateway.traces import TRACES_PATH, trace, traces
from gateway.variants import Variants
from gateway.verdicts import Verdicts, named_in
from runtime.wire import Problem, parse_object, problem_of

VARIANT_PATH = "/admin/variants/candidate"
READY_S = 30.0  # for a first replica of the candidate to answer
READ_MAX = 2000  # observations in one answer


Answer = tuple[int, Mapping[str, Any]]
Act = Callable[[Scope, bytes], Awaitable[Answer]]


def routes(live: Live, variants: Variants, kept: Kept, drains: Drains) -> list[Route]:
    """The endpoints, each behind the check."""
    steering = Steering(live, variants)
    draining = ByHand(drains)
    acts: Mapping[str, Mapping[str, Act]] = {
        "/admin/variants": {"GET": steering.told},
        VARIANT_PATH: {
            "PUT": steering.put, "PATCH": steering.lease, "DELETE": steering.remove,
        },
        f"{VARIANT_PATH}/pause": {"POST": steering.pause},
        f"{VARIANT_PATH}/resume": {"POST": steering.resume},
        f"{VARIANT_PATH}/rollback": {"POST": steering.roll_back},
        "/admin/replicas": {"GET": draining.told},
        "/admin/replicas/drain": {"POST": draining.drain},
        "/admin/replicas/resume": {"POST": draining.resume},
        "/admin/observations": {"GET": steering.observations},
        TRACES_PATH: {"GET": traces(kept)},
        f"{TRACES_PATH}/{{id:path}}": {"GET": trace(live, kept)},  # a client names its requests
        "/gate/confirm-promotion": {"POST": steering.confirm},
        "/gate/rollback": {"POST": steering.confirm_rollback},
        "/gate/{fingerprint}": {"GET": steering.result},
    }  # fmt: skip
    return [Route(path, Guarded(live, methods)) for path, methods in acts.items()]


class Guarded:
    """One path's acts, by method, for those who may."""

    def __init__(self, live: Live, acts: Mapping[str, Act]) -> None:
        self._live = live
        self._acts = acts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, request_id(scope["headers"]))
        try:
            await self._answer(scope, receive, reply)
        except ClientGone:
            return
        except ValidationError as error:
            await reply.fail(problem_of(error))
        except Problem as problem:
            await reply.fail(problem)

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        edge = self._live.edge
        refuse_stranger(scope["headers"], edge.settings.admin.key_env, keys=edge.keys.required)
        act = self._acts.get(scope["method"])
        if act is None:
            methods = ", ".join(self._acts)
            raise problems.wrong_method(scope["method"], scope["path"], methods)
        waits = not scope["extensions"][OUTGOING].asked
        body = await read_body(scope["headers"], receive, edge.settings, waits=waits)
        status, payload = await act(scope, body)
        headers = [(b"content-type", b"application/json")]
        await reply.whole(status, headers, orjson.dumps(payload))


class Steering:
    """What may be asked of a rollout."""

    def __init__(self, live: Live, variants: Variants) -> None:
        self._live = live
        self._variants = variants
        self._verdicts = Verdicts(live)
        self.clock: Callable[[], float] = time.time

    async def told(self, _scope: Scope, _body: bytes) -> Answer:
        """The rollout that runs, null where none does, and where live requests are recorded."""
        await self._variants.look()
        record = self._live.edge.settings.record
        recorded = {} if record is None else {"recorded": record.path}
        return 200, {"candidate": self._variants.told(), **recorded}

    async def put(self, _scope: Scope, body: bytes) -> Answer:
        """Puts a candidate up, and answers when a replica of it is ready; the same one again goes
        on. Nothing goes to it before that."""
        wanted = Wanted.model_validate(parse_object(body))
        asked = self._orders(wanted)
        patched(self._live.edge.policy, wanted.patch)  # raises for one that cannot be
        for name in {one.api_key_env for one in wanted.replicas if one.api_key_env}:
            check_key(self._live.edge.policy, name)  # every gateway would fail at the record
        if wanted.share:
            await self._verdicts.refuse(wanted.roots)

        def make(before: Orders | None) -> Orders:
            if before is not None and before.id != wanted.id and before.live(self.clock()):
                raise problems.rollout_runs(before.id)
            if before is not None and before.id == wanted.id and before.ended:
                raise problems.rollout_ended(before.id, before.ended)
            if before is not None and before.id == wanted.id:
                return replace(asked, since=before.since, paused=before.paused, stage=before.stage)
            return asked

        await self._variants.steer(make)
        try:
            async with asyncio.timeout(min(READY_S, wanted.lease_s)):
                while not self._ready():  # noqa: ASYNC110  # probes tell nobody
                    await asyncio.sleep(0.02)
        except TimeoutError:
            states = [one["state"] for one in (self._variants.told() or {}).get("replicas", ())]
            raise problems.candidate_not_ready(states) from None
        return 200, {"candidate": self._variants.told()}

    def _ready(self) -> bool:
        told = self._variants.told()
        return told is not None and told["ready"]

    async def lease(self, _scope: Scope, body: bytes) -> Answer:
        """Share and shadow from now on, until the lease ends."""
        wanted = Renewed.model_validate(parse_object(body))
        until = self.clock() + wanted.lease_s
        if wanted.share:
            await self._verdicts.refuse((self._variants.told() or {}).get("roots", {}))

        def make(before: Orders | None) -> Orders:
            orders = self._same(before, wanted.id)
            if orders.ended:
                raise problems.rollout_ended(orders.id, orders.ended)
            stage = orders.stage if wanted.stage is None else wanted.stage.model_dump()
            return replace(
                orders, share=wanted.share, shadow=wanted.shadow, until=until, stage=stage
            )

        await self._variants.steer(make)
        return 200, {"candidate": self._variants.told()}

    async def pause(self, _scope: Scope, body: bytes) -> Answer:
        """The controller is told to stay where it is: shares and leases go on, and harm still ends
        it."""
        wanted = Pausing.model_validate(parse_object(body))
        return await self._paused(wanted.id, wanted.why)

    async def resume(self, _scope: Scope, body: bytes) -> Answer:
        """The controller goes on."""
        return await self._paused(Pausing.model_validate(parse_object(body)).id, "")

    async def _paused(self, name: str, why: str) -> Answer:
        def make(before: Orders | None) -> Orders:
            orders = self._same(before, name)
            if orders.ended:
                raise problems.rollout_ended(orders.id, orders.ended)
            return replace(orders, paused=why)

        await self._variants.steer(make)
        return 200, {"candidate": self._variants.told()}

    async def roll_back(self, _scope: Scope, body: bytes) -> Answer:
        """Takes everything from the candidate, here at once; this needs no store. Where this
        gateway cannot follow the rollout, those that can hear of it by the record."""
        wanted = Ending.model_validate(parse_object(body))

        def ended(before: Orders | None) -> Orders:
            orders = self._same(before, wanted.id)
            return orders.rolled_back(wanted.why, self.clock(), blamed=wanted.blamed)

        told = self._variants.told()
        if told is not None and told["id"] == wanted.id:
            self._variants.roll_back(wanted.why, blamed=wanted.blamed)
        else:
            await self._variants.steer(ended)
        return 200, {"candidate": self._variants.told()}

    async def remove(self, scope: Scope, _body: bytes) -> Answer:
        """Takes the candidate away; what is under way there ends there. `result` may say how the
        rollout came out."""
        asked = query(scope)
        name = asked.get("id", "")

        def make(before: Orders | None) -> None:
            self._same(before, name)

        await self._variants.remove(make, asked.get("result", "")[:200])
        return 200, {"candidate": self._variants.told()}

    async def observations(self, scope: Scope, _body: bytes) -> Answer:
        """What was seen of live requests since a cursor, of all gateways that share the store."""
        asked = query(scope)
        limit = number(asked, "limit", READ_MAX, READ_MAX)
        seen, rest = await self._variants.observed(cursor(asked, "after"), limit)
        return 200, {"observations": seen, "cursor": rest}

    async def result(self, scope: Scope, _body: bytes) -> Answer:
        """As a web metric of Argo Rollouts reads it: `result` is pass, fail or inconclusive."""
        return 200, await self._verdicts.result(scope["path_params"]["fingerprint"])

    async def confirm(self, _scope: Scope, body: bytes) -> Answer:
        """Flagger's `confirm-promotion`: 200 lets the canary be promoted, 403 holds it."""
        found = await self._verdicts.result(named_in(parse_object(body)))
        if found["result"] != "pass":
            raise problems.gate_not_passed(found)
        return 200, found

    async def confirm_rollback(self, _scope: Scope, body: bytes) -> Answer:
        """Flagger's `rollback`: 200 rolls the canary back, 403 lets it go on."""
        found = await self._verdicts.result(named_in(parse_object(body)))
        if found["result"] != "fail":
            raise problems.gate_not_passed(found)
        return 200, found

    def _orders(self, wanted: Wanted) -> Orders:
        now = self.clock()
        return Orders(
            wanted.id, wanted.name, wanted.patch,
            tuple(one.model_dump(exclude_defaults=True) for one in wanted.replicas),
            wanted.fingerprints, wanted.roots, wanted.share, wanted.shadow,
            now + wanted.lease_s, now,
        )  # fmt: skip

    def _same(self, before: Orders | None, name: str) -> Orders:
        if before is None or before.id != name:
            raise problems.no_rollout(name)
        return before
