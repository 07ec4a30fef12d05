"""Where a request's time went, as phases that add up to the whole; and `Server-Timing`. Pure.

A replica of ours tells what it took of the time; of others the wait for the first token is
`prefill` and the rest `decode`, and a whole answer is all `decode`. Every request comes through
here, so that it is written for few calls.
"""

from __future__ import annotations

from gateway.tallies import PHASES
from gateway.trail import Hop, Trail, answered, now

SERVER_TIMING = b"server-timing"


def phases(trail: Trail) -> dict[str, float]:
    """Seconds by phase of a request that has ended; `gateway` is what no other phase has."""
    return dict(zip(PHASES, spent(trail), strict=True))


def spent(trail: Trail) -> tuple[float, ...]:
    """The same in the order of PHASES. Every part of the way that has begun is over."""
    upload, recv_queue = trail.due - trail.began, trail.read - trail.due
    admit, queue = trail.admit.ended - trail.admit.began, trail.queue.ended - trail.queue.began
    trim, route = trail.trim.ended - trail.trim.began, trail.prompt.ended - trail.prompt.began
    network = replica_queue = prefill = decode = 0.0
    hops = trail.way
    if hops:
        if trail.admit.ended:
            route += hops[0].began - (trail.queue.ended or trail.admit.ended)
        end = trail.ended if trail.done is None else min(trail.done, trail.ended)
        hop = answered(hops)
        if hop is None:
            network = hops[-1].began - hops[0].began
            prefill = max(0.0, min(hops[-1].ended or end, end) - hops[-1].began)
        else:  # what attempts before the one that answered took counts as network
            network, replica_queue, prefill, decode = _answering(trail, hop, end)
            network += hop.began - hops[0].began
    known = recv_queue + admit + queue + trim + route + network + replica_queue + prefill + decode
    download = trail.download.ended - trail.download.began
    gateway = max(0.0, trail.ended - trail.due - known - download)
    return (
        upload, recv_queue, admit, queue, trim, route, network, replica_queue, prefill, decode,
        download, gateway,
    )  # fmt: skip


def _answering(trail: Trail, hop: Hop, end: float) -> tuple[float, float, float, float]:
    """Network, queue, prefill and decode of the attempt that answered, to the end of its answer."""
    first = hop.first
    assert first is not None, "it answered"
    wait, rest = first - hop.began, max(0.0, end - first)
    told = hop.told
    if not trail.stream:  # a whole answer comes when all is done
        wait, rest = wait + rest, 0.0
    if told is None:
        return (0.0, 0.0, wait, rest) if trail.stream else (0.0, 0.0, 0.0, wait)
    replica_queue = min(told.queue_s, wait)
    prefill = min(told.prefill_s, wait - replica_queue)
    left = rest if trail.stream else wait - replica_queue - prefill
    # Where another replica went on with it, that tells of its part alone.
    decode = min(told.decode_s, left) if hop is trail.hops[-1] else rest
    return wait + rest - replica_queue - prefill - decode, replica_queue, prefill, decode


def whole_time(began: float) -> bytes:
    """Of an answer that has no trail, since the first byte of its request."""
    return b"total;dur=%.3f" % (1000 * (now() - began))


def server_timing(trail: Trail) -> bytes:
    """What is known when the head of the answer goes: of a stream up to its first token."""
    at = now()
    upload, recv_queue = trail.due - trail.began, trail.read - trail.due
    admit, queue = trail.admit.s, trail.queue.s
    trim, route = trail.trim.ended - trail.trim.began, trail.prompt.ended - trail.prompt.began
    hops = trail.way
    hop = answered(hops)
    there = b""
    if hop is not None and hop.first is not None:
        began = hops[0].began
        if trail.admit.ended:
            route += began - (trail.queue.ended or trail.admit.ended)
        there = _there(trail, hop, hop.first - began)
    return (
        b"upload;dur=%.3f, recv_queue;dur=%.3f, admit;dur=%.3f, queue;dur=%.3f, trim;dur=%.3f, "
        b"route;dur=%.3f, %btotal;dur=%.3f"
    ) % (
        1000 * upload, 1000 * recv_queue, 1000 * admit, 1000 * queue, 1000 * trim, 1000 * route,
        there, 1000 * (at - trail.began),
    )  # fmt: skip


def _there(trail: Trail, hop: Hop, wait: float) -> bytes:
    """Of `Server-Timing`, the part of the replica that answered: so many seconds."""
    told = hop.told
    if told is None:
        there = b"replica;dur=%.3f, " % (1000 * wait)
    else:
        known = told.queue_s + told.prefill_s + told.decode_s
        there = b"network;dur=%.3f, replica_queue;dur=%.3f, prefill;dur=%.3f, " % (
            1000 * max(0.0, wait - known), 1000 * told.queue_s, 1000 * told.prefill_s,
        )  # fmt: skip
        if told.decode_s:
            there += b"decode;dur=%.3f, " % (1000 * told.decode_s)
    if trail.stream and hop.first is not None:
        there += b"first_token;dur=%.3f, " % (1000 * (hop.first - trail.due))
    return there
