"""Which traces stay in memory: the latest, and longer those that somebody will look for."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

from hypothesis import given, strategies as st

from gateway.sieve import Sieve, sift
from gateway.trace_ring import Ring
from gateway.trail import Trail
from policies.tracing import ALWAYS, Tracing
from tests.gateway.world import HELLO, Peer, gateway, on_loop, pong, until, upstream

_numbers = itertools.count(1)


def ended(why: str = "") -> Trail:
    number = next(_numbers)
    one = Trail(f"r{number}", "/", 0.0, 0.0)
    one.ended, one.keep = float(number), why
    return one


@given(
    st.integers(0, 9),
    st.lists(st.sampled_from(("", "", *ALWAYS)), max_size=60),
)
def test_the_latest_stay_and_before_them_what_is_worth_it_in_equal_shares(
    most: int, reasons: list[str]
) -> None:
    """Against the plain way: all of them, looked through from the end."""
    ring, every = Ring(most), [ended(why) for why in reasons]
    for one in every:
        ring.keep(one)
    kept: list[Trail] = list(reversed(every))[:most]
    shares: Counter[str] = Counter()
    for one in list(reversed(every))[most:]:
        if most and one.keep and shares[one.keep] < -(-most // len(ALWAYS)):
            shares[one.keep] += 1
            kept.append(one)
    assert list(ring) == kept
    assert len(ring) == len(kept)
    assert ring.latest == min(most, len(every))
    assert ring.first(5, slow=False) == kept[:5]
    assert ring.first(5, slow=True) == sorted(kept, key=lambda one: one.e2e_s, reverse=True)[:5]


def test_one_that_failed_outlives_a_flood_of_late_ones() -> None:
    """The bug: at 30 requests a second it was gone after 17 s, before anybody could look."""
    ring, failed = Ring(256), ended("error")
    ring.keep(failed)
    for at in range(10_000):
        ring.keep(ended("late" if at % 2 else ""))
    assert ring.trail(failed.request_id) is failed
    found = asyncio.run(sift(ring, Sieve.of({"limit": "1"}), ring.latest))
    assert (found["kept"], found["older"]) == (256 + 64 + 1, 65)


@on_loop
async def test_a_request_that_failed_is_found_when_many_have_gone_well_since() -> None:
    """By its id, and in the list of what failed, where it is said to be of before the latest."""

    async def breaks(peer: Peer) -> None:
        await (peer.json({"error": {}}, status=500) if len(fake.requests) == 1 else pong(peer))

    async with (
        upstream(breaks) as fake,
        gateway(fake, tracing=Tracing(keep=3), retries={"max_attempts": 1}) as front,
    ):
        failed = await front.post(HELLO)
        assert failed.status_code >= 500
        for _ in range(12):
            assert (await front.post(HELLO)).status_code == 200
        await until(lambda: front.live.edge.tracer.ring.latest == 3 and fake.running == 0)
        name = failed.headers["x-request-id"]
        trace = await front.client.get(f"/admin/traces/{name}")
        assert trace.json()["keep"] == "error"
        found = (await front.client.get("/admin/requests?outcome=failed")).json()
        assert [one["id"] for one in found["requests"]] == [name]
        assert (found["kept"], found["older"]) == (4, 1)
