"""The life of a request for a chat or a text completion, told once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from functools import partial

from starlette.types import Receive, Scope, Send

from gateway import problems
from gateway.account import Account
from gateway.admission import Admitted
from gateway.answer import Answer
from gateway.call import ClientGone, parse_call, read_body, request_id
from gateway.deadline import Deadline
from gateway.edge import Asked, Edge, Live
from gateway.keys import TENANT, Known
from gateway.listener import COMING, OUTGOING
from gateway.pacing import paced
from gateway.receipt import Left
from gateway.relay import Silence, relay
from gateway.reply import Outgoing, Reply
from gateway.retries import Meaning
from gateway.routing import Trip
from gateway.usage import usage_of
from runtime.wire import Problem

log = logging.getLogger("headgate.gateway")


class Completions:
    """The endpoint of one path, as an ASGI application."""

    def __init__(self, path: str, live: Live) -> None:
        self.path = path
        self.live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = scope["extensions"]
        reply = Reply(send, request_id(scope["headers"]), found[OUTGOING])
        reply.direct = found[OUTGOING].whole
        edge, coming = self.live.edge, found[COMING]
        reply.trail = edge.tracer.begin(
            reply.request_id, self.path, scope["headers"], coming.began, coming.read
        )
        failure: BaseException | None = None
        try:
            await self._answer(scope, receive, reply)
        except ClientGone as error:
            failure = error
        except Problem as problem:
            failure = problem
            await reply.fail(problem)
        except asyncio.CancelledError as error:
            # Only the server cancels us, when the drain is over: the client is told before the end.
            failure = error
            await reply.fail(problems.stopped())
        except Exception as error:
            failure = error
            log.exception("request %s failed inside the gateway", reply.request_id)
            await reply.fail(problems.internal())
        finally:
            reply.trail.last = found[OUTGOING].end()
            reply.trail.download = found[OUTGOING].lagged
            edge.tracer.end(reply.trail, reply, failure, edge.admission.tallies, edge.pool.ask)

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        """Takes a place, reads and parses, then listens to replica and client at once."""
        edge = self.live.edge
        edge.state.begin()
        edge.pool.enter()
        try:
            headers = scope["headers"]
            tenant: Known = scope["extensions"][TENANT]
            assert reply.trail is not None, "a request's trail begins before it is read"
            reply.trail.tenant = tenant.name
            outgoing = scope["extensions"][OUTGOING]
            waits = not outgoing.asked
            coming = scope["extensions"][COMING]
            try:
                body = await read_body(headers, receive, edge.settings, waits=waits)
            finally:
                coming.stopped()
                reply.trail.received(coming.due, coming.read)
            call = parse_call(self.path, body, headers, reply.request_id)
            reply.trail.parsed(call)
            asked = Asked(call, tenant, reply, outgoing, coming.due, coming.read)
            beside = self.live.beside
            with edge.recording(asked, headers):
                if beside is None:
                    await serve(edge, asked)
                else:
                    await beside.serve(edge, asked, serve)
        finally:
            edge.pool.leave()


async def serve(edge: Edge, asked: Asked, strict: bool = False) -> None:
    """The answer by one edge, until its client has it. Raises ClientGone, and Problem; with
    `strict`, for a replica's error, too."""
    with edge.account(asked) as account:
        account.strict = strict
        await _serve(edge, asked, account, strict=strict)
        if asked.outgoing.lags:  # no place is held for it: what its replica had to do is done
            await taken(asked, edge.settings.total_timeout_s)


async def _serve(edge: Edge, asked: Asked, account: Account, *, strict: bool) -> None:
    call, tenant, reply, outgoing = asked.call, asked.tenant, asked.reply, asked.outgoing
    service = account.service = edge.tiers.tier(call, tenant)
    reply.more.append((b"x-headgate-tier", service.tier.encode()))
    call = edge.tiers.told(call, tenant, service)
    trail = reply.trail
    assert trail is not None, "it began before the request was read"
    trail.service = service
    account.trace_id = edge.tracer.exemplar(trail)
    trimmed = None
    if edge.shortener.on:
        with trail.trim:
            call, trimmed = await edge.shortener.trim(call, tenant.name, service.tier)
        trail.trimmed = account.trimmed = trimmed
    if trimmed is not None:
        reply.more.append((b"x-headgate-trimmed-tokens", b"%d" % trimmed.removed_tokens))
    recall = edge.recall(call, tenant.name, service.tier)
    count = partial(edge.admission.counted, tenant, service.tier)
    if recall and await recall.give(reply, count):
        return
    silence = Silence(edge.settings, reply, stream=call.stream)
    with trail.prompt:
        prompt = account.prompt = await edge.prompts.read(call)
        trip = edge.routing.trip(call, prompt, service.tier, tenant.name)
    trip.trail = trail
    if trimmed is not None:
        trip.receipt.trimmed = Left.of(trimmed, prompt.tokens)
    reply.more.append((b"x-headgate-receipt", trip.receipt.id.encode()))
    place = edge.admission.place(call, tenant, service, prompt.tokens, trip.uncached)
    trail.admit, trail.queue = place.admit, place.queue
    place.arrived = asked.came
    forward = _forward(edge, trip, place, account, silence, strict=strict)
    work = attend(forward, outgoing, silence)
    limit_s = service.limit_s(edge.settings.total_timeout_s)
    await within(limit_s, service.deadline_ms, work)
    if recall:
        recall.keep()


async def _forward(
    edge: Edge, trip: Trip, place: Admitted, account: Account, silence: Silence, *, strict: bool
) -> None:
    """Waits for the call's turn, opens it on a replica and relays the answer."""
    call, reply = trip.call, account.reply
    async with paced(reply, place.pace_per_s, silence), place:
        reply.more += place.headers()
        async with edge.pool.open(call, trip) as answer:
            account.answered(answer)
            if strict and isinstance(answer, Answer) and answer.meaning is not Meaning.ANSWER:
                url = answer.attempt.replica.url
                raise problems.upstream_failed(url, f"it answered {answer.status}")
            if not answer.refused:
                place.began()
            silence.answering(answer.interrupt)
            await relay(answer, reply, silence, stream=call.stream)
            usage = account.usage = usage_of(reply.recent)
            place.used(usage)
            account.relayed(answer)
            if trip.trail is not None:
                trip.trail.usage = usage
            if not answer.resumes:  # what two replicas did together tells nothing of either
                trip.served(answer.attempt.booking, usage)
    account.charged = place.charged


async def taken(asked: Asked, limit_s: float | None) -> None:
    """Until the client has all of its answer. Raises ClientGone, and Problem 504 where the request
    takes longer than `limit_s`, with its connection cut: no other word fits into an answer."""
    left_s = None if limit_s is None else asked.read + limit_s - time.monotonic()
    try:
        async with asyncio.timeout(left_s) as limit:
            await asked.outgoing.sent()
    except TimeoutError:
        if limit_s is None or not limit.expired():
            raise
        asked.outgoing.cut()
        raise problems.request_timeout(limit_s, None) from None


async def within(
    limit_s: float | None, deadline_ms: float | None, work: Coroutine[None, None, None]
) -> None:
    """Raises Problem 504 when `work` takes longer, which is cancelled then."""
    if limit_s is None:
        await work
        return
    try:
        with Deadline(asyncio.get_running_loop().time() + limit_s) as limit:
            await work
    except TimeoutError:
        if not limit.passed:
            raise
        raise problems.request_timeout(limit_s, deadline_ms) from None


async def attend(
    forward: Coroutine[None, None, None], outgoing: Outgoing, silence: Silence
) -> None:
    """Runs `forward` to its end, cancelled when the client goes; watches over the replica's silence
    meanwhile. Needs no task of its own: a connection that is lost cancels the one that runs.

    Whatever ends it, nothing is left running: a cancelled `forward` closes its connection to the
    replica before this returns. Raises what `forward` raised, and ClientGone.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        silence.client_left()
        task.cancel()

    if not outgoing.when_gone(leave):
        forward.close()
        raise ClientGone
    silence.watch()
    try:
        await forward
    except asyncio.CancelledError:
        if gone and not task.uncancel():
            raise ClientGone from None
        raise
    finally:
        silence.end()
        outgoing.when_gone(None)
