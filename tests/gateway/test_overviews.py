"""Several gateway processes behind one port, as the console sees them: as one."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

from hypothesis import given, strategies as st

from gateway.overviews import history, total
from tests.gateway.scripted import ASKED, TOKENS, Engine
from tests.gateway.test_overview import overview
from tests.gateway.test_siblings import folder, one_of, two
from tests.gateway.world import gateway, on_loop, until, upstream

__all__ = ["folder"]  # the fixture

numbers = st.integers(0, 1000)
samples = st.lists(st.tuples(st.floats(0.5, 1.4), st.integers(0, 9)), min_size=1, max_size=12)


@on_loop
async def test_whichever_process_is_asked_tells_of_all(folder: Path) -> None:
    """Counts are sums, quantiles are of all, the latest requests are in one order; each replica is
    there once, with what all have on it."""
    async with upstream(Engine("one")) as fake, two(folder, fake) as (one, other):
        for at in range(6):
            assert (await (one, other, other)[at % 3].post(ASKED)).status_code == 200
        await until(lambda: not one.pool.in_flight and not other.pool.in_flight)
        for front in (one, other):
            front.live.edge.pool.replicas[0].waiting_tokens = 5
        told = [await overview(front) for front in (one, other)]
        for front in (one, other):
            front.live.edge.pool.replicas[0].waiting_tokens = 0
        for found in told:
            standard = next(tier for tier in found["tiers"] if tier["name"] == "standard")
            assert standard["now"]["admitted"] == standard["now"]["in_time"] == 6
            assert 0 < standard["ttft_s"]["p50"] <= standard["ttft_s"]["p95"]
            assert standard["slowest"] in {request["id"] for request in found["requests"]}
            assert found["cached_tokens"]["untold"] == 6
            assert found["tokens"]["stages"]["emitted"] == 6 * len(TOKENS)
            assert found["tokens"]["violations"] == {}
            (replica,) = found["replicas"]
            assert (replica["state"], replica["waiting_tokens"]) == ("ready", 10)
            moments = [request["at"] for request in found["requests"]]
            assert (len(moments), moments) == (6, sorted(moments, reverse=True))
            assert (found["process"]["told"], found["process"]["of"]) == (2, 2)
        assert told[0]["process"]["id"] == told[1]["process"]["id"]
        assert told[0]["process"]["pid"] == told[1]["process"]["pid"]  # a test has one


@on_loop
async def test_a_process_that_is_away_leaves_the_others_to_tell(folder: Path) -> None:
    """And the foot of the page knows of how many it is."""
    dead = socket.socket(socket.AF_UNIX)  # of one that was killed: nobody listens
    dead.bind(str(folder / "2.sock"))
    dead.close()
    async with (
        upstream(Engine("one")) as fake,
        one_of(3, folder, "0", fake) as one,
        one_of(3, folder, "1", fake) as other,
    ):
        assert (await other.post(ASKED)).status_code == 200
        await until(lambda: not other.pool.in_flight)
        found = await overview(one)
        assert (found["process"]["told"], found["process"]["of"]) == (2, 3)
        assert found["cached_tokens"]["untold"] == 1


@on_loop
async def test_one_process_alone_tells_what_several_would(folder: Path) -> None:
    """The same names, so that a page reads either."""
    async with upstream(Engine("one")) as fake:
        async with gateway(fake) as front:
            await front.post(ASKED)
            await until(lambda: not front.pool.in_flight)
            alone = await overview(front)
        async with two(folder, fake) as (one, other):
            await other.post(ASKED)
            several = await overview(one)
    assert shape(alone) == shape(several)


def shape(found: Any) -> Any:
    """Names alone; of lists, of their first."""
    if isinstance(found, dict):
        return {name: shape(value) for name, value in found.items() if name != "samples"}
    return [shape(value) for value in found[:1]] if isinstance(found, list) else None


@given(st.lists(st.dictionaries(st.sampled_from("abc"), numbers), min_size=1))
def test_a_total_has_every_name_with_its_sum(found: list[dict[str, int]]) -> None:
    names = {name for one in found for name in one}
    assert total(found) == {name: sum(one.get(name, 0) for one in found) for name in names}
    assert total([None, None]) is None


@given(st.lists(samples, min_size=1, max_size=4), st.integers(-3, 14))
def test_a_history_of_all_goes_up_where_theirs_do(
    found: list[list[tuple[float, int]]], since: int
) -> None:
    """Each second once; at each the sum of what each process had counted by then."""
    kept = []
    for steps in found:
        at, count, one = 0.0, 0, []
        for step_s, more in steps:
            at, count = at + step_s, count + more
            one.append({"at": at, "share": None, "tiers": {"t": {"n": count}}})
        kept.append(one)
    told = asyncio.run(history(kept, since))
    moments = [one["at"] for one in told]
    assert moments == sorted(set(moments))
    assert all(since < at <= min(one[-1]["at"] for one in kept) for at in moments)
    for sample in told:
        then = [[s for s in one if s["at"] <= sample["at"]] for one in kept]
        wanted = sum(one[-1]["tiers"]["t"]["n"] for one in then if one)
        assert sample["tiers"]["t"]["n"] == wanted
    assert json.loads(json.dumps(told)) == told
