"""The candidate's edge beside the baseline's: which of the two answers a request, by its session.

Knows who goes where, and that whatever the candidate cannot answer the baseline answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import orjson

from gateway import problems
from gateway.call import CHAT_PATH, Call, ClientGone
from gateway.edge import Asked, Edge, Serve
from gateway.lane import Lane
from gateway.observe import LEFT, Watch, failed, observation
from gateway.orders import Orders
from gateway.shadow import Shadows
from gateway.upstream import Pool
from runtime.wire import Problem
from telemetry import Observation

log = logging.getLogger("headgate.gateway")

SESSION_FIELDS = ("prompt_cache_key", "user")
VARIANT_HEADER = b"x-headgate-variant"


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
        watch = asked.reply.through(Watch)
        await self._watched(baseline, asked, serve, watch, session, "baseline")
        if mirror is not None:
            mirror.answered(watch.speech.digest)

    async def _by_candidate(self, asked: Asked, serve: Serve, session: bytes) -> bool:
        """False where the baseline has to answer, of which the client notices nothing."""
        reply = asked.reply
        own_headers = len(reply.more)
        reply.more.append((VARIANT_HEADER, b"candidate"))
        watch = reply.through(Watch)

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
