"""Baseline or candidate, by session: a second edge that takes the share that a controller leases.

Knows who goes where, and that whatever the candidate cannot answer the baseline answers; how shares
are chosen is the controller's (evals/rollout.py). Without a rollout nothing of this is on a
request's way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from hashlib import blake2b
from typing import Any

import orjson

from gateway import problems
from gateway.call import CHAT_PATH, Call, ClientGone
from gateway.edge import Asked, Edge, Live, Serve, build
from gateway.lane import Lane
from gateway.observe import LEFT, Watch, failed, observation
from gateway.orders import OBSERVED, OBSERVED_S, Orders, change, current
from gateway.replica import replicas_of
from gateway.shadow import Shadows
from gateway.upstream import Pool
from policies.discovery import Upstream
from policies.schema import Deployment, Gateway
from runtime.wire import Problem
from telemetry import Observation

log = logging.getLogger("headgate.gateway")

LOOK_S = 0.2  # between looks at the record: so late does another gateway's rollback come here
LOST_S = 60.0  # at least, between two lines of the log about a record that cannot be followed
SESSION_FIELDS = ("prompt_cache_key", "user")
VARIANT_HEADER = b"x-headgate-variant"
# Known to the listening socket, to the door, or to those who steer: no candidate's to change.
NOT_PATCHED = frozenset(
    ("host", "port", "processes", "store", "tenants", "secret_env", "admin", "drain_s", "reload",
     "max_body_bytes", "body_timeout_s", "max_in_flight")
)  # fmt: skip


class Variant:
    """The candidate's edge beside the baseline's."""

    def __init__(
        self,
        orders: Orders,
        edge: Edge,
        tell: Callable[[Observation], None],
        roll_back: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`tell`: who collects observations. `roll_back`: who tells the other gateways."""
        admin = edge.settings.admin
        self.orders = orders
        self.edge = edge
        self.shadows = Shadows(edge, admin.shadows, self._saw)
        self._lane = Lane(admin.window_s, orders.fingerprints)
        self._tell = tell
        self._spread = roll_back
        self._clock = clock
        self.suspended = False  # while it cannot be known whether another gateway has rolled back

    # ---- who goes where -------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether a replica of the candidate is well, and is the one that was ordered."""
        wanted = self.orders.fingerprints
        return any(
            replica.healthy and (not wanted or replica.fingerprint in (None, *wanted))
            for replica in self.edge.pool.replicas
        )

    def arm(self, session: bytes) -> str:
        """`candidate`, `shadow` (the baseline answers, the candidate is asked too) or `baseline`.

        Who is in a share is in every larger one, so that a session moves once at most."""
        orders = self.orders
        if not orders.live(self._clock()) or self.suspended or not self.ready():
            return "baseline"
        if drawn(session, orders.id) < orders.share:
            return "candidate"
        return "shadow" if drawn(session, f"shadow {orders.id}") < orders.shadow else "baseline"

    def roll_back(self, why: str, *, blamed: bool = True) -> None:
        """From now on nothing goes to the candidate; what is under way there ends there."""
        if not self.orders.ended:
            self.orders = self.orders.rolled_back(why, self._clock(), blamed=blamed)
            log.warning("rollout %s is rolled back: %s", self.orders.id, why)
            self._spread(why)

    # ---- one request ----------------------------------------------------------------------------

    async def serve(self, baseline: Edge, asked: Asked, serve: Serve) -> None:
        """The answer by whoever is to give it; the baseline's where the candidate has none."""
        session = session_of(asked.call, asked.tenant.name, asked.reply.request_id)
        arm = self.arm(session)
        if asked.reply.trail is not None:
            asked.reply.trail.arm = "baseline" if arm == "shadow" else arm
        if arm == "candidate" and await self._by_candidate(asked, serve, session):
            return
        rescued = arm == "candidate"
        mirror = self.shadows.mirror(asked, session.hex()) if arm == "shadow" else None
        if rescued:  # it was seen already, and what it took is not the baseline's
            await serve(baseline, asked, False)
            return
        watch = asked.reply.through(lambda send, out: Watch(send, out, _loop_time()))
        await self._watched(baseline, asked, serve, watch, session, "baseline")
        if mirror is not None:
            mirror.answered(watch.speech.digest)

    async def _by_candidate(self, asked: Asked, serve: Serve, session: bytes) -> bool:
        """False where the baseline has to answer, of which the client notices nothing."""
        reply = asked.reply
        own_headers = len(reply.more)
        reply.more.append((VARIANT_HEADER, b"candidate"))
        watch = reply.through(lambda send, out: Watch(send, out, _loop_time()))

        async def in_time(edge: Edge, asked: Asked, strict: bool) -> None:
            patience_s = edge.settings.admin.patience_s
            try:
                async with asyncio.timeout(patience_s) as limit:
                    watch.when_relayed = lambda: limit.reschedule(None)
                    await serve(edge, asked, strict)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise problems.upstream_timeout(patience_s) from None
            finally:
                watch.when_relayed = lambda: None

        try:
            with entered(self.edge.pool):
                await self._watched(self.edge, asked, in_time, watch, session, "candidate")
        except Problem as problem:
            if problem.status < 500 or watch.relayed:
                raise
        else:
            return True
        del reply.more[own_headers:]
        return False

    async def _watched(
        self, edge: Edge, asked: Asked, serve: Serve, watch: Watch, session: bytes, arm: str
    ) -> None:
        """Serves, and notes how that went."""
        problem: Problem | None = None
        try:
            await serve(edge, asked, arm == "candidate")
        except Problem as error:
            problem = error
            raise
        except (ClientGone, asyncio.CancelledError):
            problem = Problem(LEFT, "the client left, or the gateway stops", code="client_left")
            raise
        except Exception:
            problem = problems.internal()
            raise
        finally:
            seen = observation(edge, asked, watch, arm, session.hex(), self._clock())
            if problem is not None:
                seen = failed(seen, problem)
            self._saw(seen)

    def _saw(self, seen: Observation) -> None:
        self._tell(seen)
        why = self._lane.saw(seen, self._clock())
        if why is not None:
            self.roll_back(why)


class Variants:
    """What this process makes of the record that all gateways share."""

    def __init__(self, live: Live, clock: Callable[[], float] = time.time) -> None:
        self.live = live
        self._clock = clock
        self._state = live.edge.state
        self._ended: dict[str, str] = {}  # rollouts -> why: for good, whatever a record says
        self._variant: Variant | None = None
        self.last: Mapping[str, Any] | None = None  # the rollout before, as it was told at its end
        self._left = ""  # what its controller said as it took it away
        self._ordered = ""  # the rollout of the record, whether it can be followed or not
        self._lost = ""  # why it cannot be, as the log was told
        self._lost_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follows the record meanwhile."""
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            for one in (task, *self._tasks):
                one.cancel()
            await asyncio.gather(task, *self._tasks, return_exceptions=True)
            if self._variant is not None:
                await self._variant.shadows.end()

    async def _follow(self) -> None:
        while True:
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001  # whatever a record says, the next is read
                self._lose(error)
                await self._take_down()
            else:
                self._find()
            await asyncio.sleep(LOOK_S)

    def _lose(self, error: Exception) -> None:
        """One line for as long as the reason is the same. A Problem says it all; of anything else,
        which would be a fault of ours, the log gets the place, too."""
        why = str(error) or type(error).__name__
        now = self._clock()
        if why == self._lost or (self._lost and now < self._lost_at + LOST_S):
            return
        self._lost, self._lost_at = why, now
        log.warning(
            "rollout %s cannot be followed by this gateway, where the baseline serves: %s; start "
            "it again with what is missing, or end the rollout",
            self._ordered or "(unknown)",
            why,
            exc_info=None if isinstance(error, Problem) else error,
        )

    def _find(self) -> None:
        if self._lost:
            self._lost = ""
            log.warning("this gateway can follow rollouts again")

    async def look(self) -> Variant | None:
        """Goes by what the record says now."""
        async with self._one_at_a_time:
            away = self._state.far is not None and not self._state.far.up
            if self._variant is not None:
                self._variant.suspended = away
            if not away:
                self._ordered = ""
                orders = await current(self._state.store)
                self._ordered = orders.id if orders is not None else ""
                await self._go_by(orders)
            return self._variant

    async def _go_by(self, orders: Orders | None) -> None:
        variant = self._variant
        if variant is not None and (orders is None or not _same(orders, variant.orders)):
            await self._take_down()
            variant = None
        if orders is None:
            return
        if why := self._ended.get(orders.id):
            if not orders.ended:
                self._spread(why)
            orders = orders.rolled_back(why, self._clock())
        if variant is None:
            if not orders.ended:
                await self._put_up(orders)
        else:
            if orders.ended and not variant.orders.ended:
                self._ended[orders.id] = orders.ended
                log.warning("rollout %s was rolled back elsewhere: %s", orders.id, orders.ended)
            variant.orders = orders

    async def _put_up(self, orders: Orders) -> None:
        edge = candidate(self.live.edge, orders)
        await self.live.begin(edge)
        self._variant = Variant(orders, edge, self._tell, self._spread, self._clock)
        self.live.beside = self._variant

    async def _take_down(self) -> None:
        told = self.told()
        variant, self._variant = self._variant, None
        if variant is not None and told is not None:
            self.last = {**told, "left": self._left or "away", "left_at": self._clock()}
            self._left = ""
            self.live.beside = None
            self.live.retire(variant.edge)
            await variant.shadows.end()

    # ---- told to the others ---------------------------------------------------------------------

    def _spread(self, why: str) -> None:
        """A rollback that was decided here."""
        variant = self._variant
        if variant is not None:
            self._ended[variant.orders.id] = why

            def ended(orders: Orders | None) -> Orders | None:
                same = orders is not None and orders.id == variant.orders.id
                return variant.orders if same else orders

            self._later(self._change(ended))

    async def _change(self, make: Callable[[Orders | None], Orders | None]) -> None:
        await change(self._state.store, make, self._clock())

    def _tell(self, seen: Observation) -> None:
        keep = self.live.edge.settings.admin.observations
        entry = orjson.dumps(seen.payload())
        self._later(self._state.store.append(OBSERVED, [entry], keep, OBSERVED_S))

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- steered (gateway/admin.py) -------------------------------------------------------------

    async def steer(self, make: Callable[[Orders | None], Orders | None]) -> Variant | None:
        """Changes the record, and goes by it here at once. Raises what `make` raises, and Problem
        where gateways could not hear of it."""
        far = self._state.far
        if far is None and self.live.edge.settings.processes > 1:
            raise problems.rollout_needs_store()
        if far is not None and not far.up:
            raise problems.store_away()
        try:
            await self._change(make)
        except TimeoutError:
            raise problems.store_away() from None
        return await self.look()

    async def remove(self, make: Callable[[Orders | None], None], result: str) -> None:
        """Takes the candidate away; `result`: how the rollout came out, as its controller says."""
        self._left = result
        try:
            await self.steer(make)
        finally:
            self._left = ""

    def roll_back(self, why: str, *, blamed: bool) -> None:
        """Here at once; the others hear of it."""
        if self._variant is not None:
            self._variant.roll_back(why, blamed=blamed)

    async def observed(self, after: str, limit: int) -> tuple[list[Any], str]:
        """Observations of all gateways since a cursor, and the next cursor."""
        found = await self._state.store.read(OBSERVED, after, limit)
        return [orjson.loads(one) for one in found.entries], found.cursor

    @property
    def edge(self) -> Edge | None:
        """The candidate's, while there is one."""
        return self._variant.edge if self._variant is not None else None

    @property
    def lost(self) -> str | None:
        """The rollout that this gateway cannot follow, and why not."""
        return f"{self._ordered or '(unknown)'}: {self._lost}" if self._lost else None

    def told(self) -> Mapping[str, Any] | None:
        """For who steers: the record as this process goes by it; None without a rollout."""
        variant = self._variant
        if variant is None:
            return None
        orders = variant.orders
        return {
            "id": orders.id,
            "name": orders.name,
            "share": orders.share,
            "shadow": orders.shadow,
            "lease_s": max(0.0, round(orders.until - self._clock(), 3)),
            "since": orders.since,
            "paused": orders.paused or None,
            "stage": dict(orders.stage) or None,
            "ended": orders.ended or None,
            "ended_at": orders.ended_at,
            "blamed": orders.blamed,
            "suspended": variant.suspended,
            "ready": variant.ready(),
            "roots": dict(orders.roots),
            "in_flight": variant.edge.pool.in_flight,
            "shadowed": variant.shadows.done,
            "replicas": [
                {"url": one.url, "state": one.state(), "fingerprint": one.fingerprint}
                for one in variant.edge.pool.replicas
            ],
        }


def _same(one: Orders, other: Orders) -> bool:
    """Whether the same edge goes by both: a restarted controller may have other workers."""
    made_of = (other.id, other.patch, other.replicas, other.fingerprints)
    return (one.id, one.patch, one.replicas, one.fingerprints) == made_of


# ---- a candidate's edge -------------------------------------------------------------------------


def candidate(baseline: Edge, orders: Orders) -> Edge:
    """The baseline's edge with what the candidate changes. Raises Problem 400."""
    policy = patched(baseline.policy, orders.patch)
    if not orders.replicas:
        return build(policy, baseline.pool.replicas, baseline, arm=orders.id)
    servers = tuple(Upstream.model_validate(one) for one in orders.replicas)
    for name in {one.api_key_env for one in servers if one.api_key_env}:
        check_key(baseline.policy, name)  # orders may come by the store, too
    policy = policy.model_copy(update={"upstreams": servers, "discovery": ()})
    replicas = replicas_of(policy, (), os.environ)
    known = (one.tokenizer for one in baseline.pool.replicas if one.tokenizer is not None)
    tokenizer = next(known, None)
    for replica in replicas:
        replica.own = replica.kind == "headgate"  # a worker of ours: it sees no client's key
        replica.tokenizer = replica.tokenizer or tokenizer
    edge = build(policy, replicas, baseline, arm=orders.id)
    edge.pool.rescuers = lambda: baseline.pool.replicas
    return edge


def check_key(policy: Deployment, name: str) -> None:
    """Who steers rollouts may not have any variable of ours sent anywhere: of those that the policy
    means for replicas, one that is set. Raises Problem 400."""
    known = {*policy.gateway.admin.candidate_keys}
    known |= {one.api_key_env or "" for one in policy.upstreams}
    known |= {one.api_key_env or "" for one in policy.discovery}
    if policy.runtime is not None:
        known.add(policy.runtime.key_env or "")
    if name not in known:
        expected = "variables of the policy's replicas or in gateway.admin.candidate_keys"
        raise problems.wrong_value("replicas[].api_key_env", expected, name)
    if not os.environ.get(name, "").strip():
        set_here = "variables that are set where the gateway runs"
        raise problems.wrong_value("replicas[].api_key_env", set_here, name)


def patched(policy: Deployment, patch: Mapping[str, Any]) -> Deployment:
    """The policy with other values at dotted paths below `gateway`. Raises Problem 400."""
    whole = policy.gateway.model_dump()
    for path, value in patch.items():
        head, *names = path.split(".")
        if head != "gateway" or not names or names[0] in NOT_PATCHED:
            raise problems.wrong_value("patch", "fields of `gateway` that may differ", path)
        *within, last = names
        place = whole
        for name in within:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = value
    try:
        gateway = Gateway.model_validate(whole)
    except ValueError as error:
        raise problems.wrong_value(
            "patch", "a valid `gateway`", problems.quote(str(error))
        ) from None
    return policy.model_copy(update={"gateway": gateway})


# ---- sessions -----------------------------------------------------------------------------------


def session_of(call: Call, tenant: str, request_id: str) -> bytes:
    """What a request belongs to, as a digest: by the client's own name for it, else by how the
    conversation begins, which is the same in all its turns; a completion's prompt stands alone."""
    named = call.session(SESSION_FIELDS)
    begin: Any = named
    if named is None and call.path == CHAT_PATH:
        messages = call.data["messages"]
        users = (at for at, one in enumerate(messages) if _role(one) == "user")
        begin = messages[: next(users, 0) + 1]
    elif named is None:
        begin = call.data.get("prompt") or request_id
    data = orjson.dumps([tenant, call.model, begin])
    return blake2b(data, digest_size=12).digest()


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def drawn(session: bytes, salt: str) -> float:
    """In [0, 1), the same for the same session and rollout."""
    digest = blake2b(session, digest_size=8, key=salt.encode()[:64]).digest()
    return int.from_bytes(digest, "big") / 2**64


@contextmanager
def entered(pool: Pool) -> Iterator[None]:
    """With a place of its own there. Raises Problem 503."""
    pool.enter()
    try:
        yield
    finally:
        pool.leave()


def _loop_time() -> Callable[[], float]:
    return asyncio.get_running_loop().time
