"""Where a request's time went, as phases that add up to the whole; and `Server-Timing`. Pure.

A replica of ours tells what it took of the time; of others the wait for the first token is
`prefill` and the rest `decode`, and a whole answer is all `decode`.
"""

from __future__ import annotations

from gateway.tallies import PHASES
from gateway.trail import Trail, now

SERVER_TIMING = b"server-timing"


def phases(trail: Trail) -> dict[str, float]:
    """Seconds by phase of a request that has ended; `gateway` is what no other phase has."""
    found = dict.fromkeys(PHASES, 0.0)
    found["admit"] = trail.admit.s
    found["queue"] = trail.queue.s
    found["trim"] = trail.trim.s
    found["route"] = trail.prompt.s + _choosing_s(trail)
    if trail.hops:
        _at_replicas(trail, found)
    found["gateway"] = max(0.0, trail.e2e_s - sum(found.values()))
    return found


def _choosing_s(trail: Trail) -> float:
    """From a request's turn to its sending."""
    if not trail.hops or not trail.admit.ended:
        return 0.0
    return max(0.0, trail.hops[0].began - max(trail.admit.ended, trail.queue.ended))


def _at_replicas(trail: Trail, found: dict[str, float]) -> None:
    """What attempts before the one that answered took counts as `network`."""
    began, hop = trail.hops[0].began, trail.answered
    end = min(trail.done or trail.ended, trail.ended)
    if hop is None or hop.first is None:
        last = trail.hops[-1]
        found["network"] = last.began - began
        found["prefill"] = max(0.0, min(last.ended or end, end) - last.began)
        return
    wait, rest = hop.first - hop.began, max(0.0, end - hop.first)
    told = hop.told
    if not trail.stream:  # a whole answer comes when all is done
        wait, rest = wait + rest, 0.0
    if told is None:
        whole = not trail.stream
        found["prefill"] = 0.0 if whole else wait
        found["decode"] = wait if whole else rest
        found["network"] = hop.began - began
        return
    found["replica_queue"] = min(told.queue_s, wait)
    found["prefill"] = min(told.prefill_s, wait - found["replica_queue"])
    before = found["replica_queue"] + found["prefill"]
    found["decode"] = min(told.decode_s, rest if trail.stream else wait - before)
    if hop is not trail.hops[-1]:  # another replica went on with it, and tells of its part alone
        found["decode"] = rest
    taken = before + found["decode"]
    found["network"] = hop.began - began + wait + rest - taken


def server_timing(trail: Trail) -> bytes:
    """What is known when the head of the answer goes: of a stream up to its first token."""
    parts = [
        ("admit", trail.admit.s), ("queue", trail.queue.s), ("trim", trail.trim.s),
        ("route", trail.prompt.s + _choosing_s(trail)),
    ]  # fmt: skip
    hop = trail.answered
    if hop is not None and hop.first is not None:
        wait, told = hop.first - trail.hops[0].began, hop.told
        if told is not None:
            known = told.queue_s + told.prefill_s + told.decode_s
            parts += [
                ("network", max(0.0, wait - known)), ("replica_queue", told.queue_s),
                ("prefill", told.prefill_s),
            ]  # fmt: skip
            if told.decode_s:
                parts.append(("decode", told.decode_s))
        else:
            parts.append(("replica", wait))
        if trail.stream:
            parts.append(("first_token", hop.first - trail.began))
    parts.append(("total", now() - trail.began))
    return ", ".join([f"{name};dur={1000 * s:.3f}" for name, s in parts if s > 0]).encode()
