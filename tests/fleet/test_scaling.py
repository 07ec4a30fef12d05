"""How many replicas are wanted, and where they go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from aiohttp import web
from hypothesis import given, strategies as st
from pydantic import ValidationError

from fleet.demand import Demands, demand, samples
from fleet.placing import leaver, preferences
from fleet.scaling import Demand, Scale
from policies.fleet import Fleet

BOUNDS = Fleet(replicas_min=1, replicas_max=6, queued_tokens=100, running=10)
IDLE = Demand(0, 0)


def after(scale: Scale, size: int, *moments: tuple[float, Demand | None]) -> int:
    for now, found in moments:
        size = scale.decide(now, size, found)
    return size


@pytest.mark.parametrize(
    ("queued", "running", "wanted"),
    [(0, 0, 1), (100, 0, 1), (101, 0, 2), (0, 31, 4), (250, 11, 3), (10_000, 0, 6)],
)
def test_replicas_are_wanted_for_tokens_that_wait_and_for_answers_under_way(
    queued: float, running: float, wanted: int
) -> None:
    """The larger of the two counts, within the bounds."""
    assert Demand(queued, running).replicas(BOUNDS) == wanted


def test_a_peak_starts_nothing_and_a_lull_takes_nothing_away() -> None:
    """Up after five seconds of more, by the least of them; down after 300 of less, by the most."""
    much, more = Demand(300, 0), Demand(500, 0)
    scale = Scale(BOUNDS)
    assert after(scale, 1, (0, much), (4, IDLE), (5, much), (9, more)) == 1
    assert after(scale, 1, (10, much), (11, more)) == 3
    assert after(scale, 3, (20, IDLE), (300, Demand(150, 0)), (310, IDLE)) == 3
    assert after(scale, 3, (320, IDLE), (599, IDLE)) == 2
    assert after(scale, 2, (620, IDLE)) == 1


def test_while_nobody_can_be_asked_the_size_stays_and_what_was_known_is_old() -> None:
    scale = Scale(BOUNDS)
    assert after(scale, 1, (0, Demand(300, 0)), (3, None), (6, Demand(300, 0))) == 1
    assert after(scale, 1, (11, Demand(300, 0))) == 3


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.none() | st.floats(0, 900), st.floats(0, 90)), max_size=40
    )
)
def test_every_size_is_one_that_was_wanted_of_late(
    moments: list[tuple[float, float | None, float]],
) -> None:
    """Within the bounds, and never beyond what some moment of the last five minutes wanted."""
    scale, size, now = Scale(BOUNDS), 1, 0.0
    seen: list[tuple[float, int]] = []
    for pause_s, queued, running in moments:
        now += pause_s
        demand = None if queued is None else Demand(queued, running)
        seen += [] if demand is None else [(now, demand.replicas(BOUNDS))]
        before, size = size, scale.decide(now, size, demand)
        assert BOUNDS.replicas_min <= size <= BOUNDS.replicas_max
        if size != before:
            long = [wanted for at, wanted in seen if at >= now - BOUNDS.down_after_s]
            assert size <= max(long)
            if size > before:
                lately = [wanted for at, wanted in seen if at >= now - BOUNDS.up_after_s]
                assert size <= min(lately)


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(ValidationError, match="replicas_max is 2, less than replicas_min, 3"):
        Fleet(replicas_min=3, replicas_max=2)


def test_the_gateways_page_is_read_whatever_its_labels() -> None:
    page = (
        "# HELP headgate_gateway_queued_uncached_tokens Text.\n"
        'headgate_gateway_queued_uncached_tokens{where="waiting"} 1200.0\n'
        'headgate_gateway_queued_uncached_tokens{where="sent"} 34.0\n'
        "headgate_gateway_queued_uncached_tokens_else 9\n"
        'headgate_gateway_requests_running{tier="batch"} 3\n'
        'headgate_gateway_requests_running{tier="standard"} 4\n'
    )
    assert demand(samples(page)) == Demand(1234, 7)
    assert demand(samples("")) == IDLE


def page_of(*processes: int, of: int) -> str:
    """What a gateway of several processes answers that knows of these."""
    told = [
        f'headgate_gateway_process_told{{process="{at}"}} {float(at in processes)}'
        for at in range(of)
    ]
    runs = [f'headgate_gateway_requests_running{{process="{at}"}} {at + 1}' for at in processes]
    return "\n".join([*told, *runs])


@pytest.mark.parametrize(
    ("pages", "running", "asked"),
    [
        ([page_of(0, 1, of=2), page_of(0, 1, of=2)], 3, 1),
        ([page_of(0, of=2), page_of(1, of=2)], 3, 2),
        ([None, page_of(0, 1, of=2)], 3, 2),
        ([None, page_of(1, of=2)], None, 2),
        (["headgate_gateway_requests_running 4"], 4, 1),
        ([None], None, 1),
    ],
)
def test_each_gateway_process_counts_once_whoever_tells_of_it(
    pages: list[str | None], running: float | None, asked: int
) -> None:
    """A page of all is enough; where one does not answer and nobody tells of it, nothing is
    known."""
    looks = 0

    async def found() -> Demand | None:
        nonlocal looks

        def answering(page: str | None) -> Callable[[web.Request], Awaitable[web.Response]]:
            async def answer(_request: web.Request) -> web.Response:
                nonlocal looks
                looks += 1
                return web.Response(status=503) if page is None else web.Response(text=page)

            return answer

        async with AsyncExitStack() as stack:
            urls = []
            for page in pages:
                app = web.Application()
                app.router.add_get("/metrics", answering(page))
                runner = web.AppRunner(app)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            return await (await stack.enter_async_context(Demands(urls, "key")))()

    assert asyncio.run(found()) == (None if running is None else Demand(0, running))
    assert looks == asked


# ---- places -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Some:
    domain: str | None
    ready: bool = True
    busy: int = 0


def test_the_emptiest_domain_comes_first_and_one_that_lost_a_replica_last() -> None:
    taken = ["a", "a", "b"]
    assert preferences(["a", "b", "c", "a"], taken, (), strict=False) == ["c", "b", "a"]
    assert preferences(["a", "b", "c"], taken, {"c"}, strict=False) == ["b", "a", "c"]
    assert preferences(["a", "b", "c"], taken, (), strict=True) == ["c"]
    assert preferences(["a", "b"], taken, (), strict=True) == []


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.booleans())
def test_replicas_put_one_by_one_are_spread_evenly(domains: list[str], strict: bool) -> None:
    """No domain ever has two more than another; strictly, none has two."""
    taken: list[str] = []
    for _ in domains:
        found = preferences("abcd", taken, (), strict=strict)
        taken += found[:1]
    counts = [taken.count(domain) for domain in "abcd"]
    assert max(counts) - min(counts) <= 1
    assert not strict or max(counts) <= 1


def test_who_is_missed_least_goes_first() -> None:
    """Not ready, then from the fullest domain, then idle, then young."""
    old, young, busy = Some("a"), Some("a"), Some("a", busy=3)
    alone, starting = Some("b"), Some("b", ready=False)
    assert leaver([old, starting, busy]) is starting
    assert leaver([alone, old, busy]) is old
    assert leaver([old, young, busy]) is young
    assert leaver([alone]) is alone
