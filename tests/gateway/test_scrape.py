"""One page of metrics tells of all gateway processes behind one port."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain
from prometheus_client.samples import Sample

from gateway.scrape import PIECE_BYTES
from gateway.siblings import SILENT_S
from tests.gateway.test_metrics import said, strange, usage
from tests.gateway.test_siblings import folder, one_of
from tests.gateway.world import (
    DONE,
    STREAMED,
    Fake,
    Front,
    Peer,
    gateway,
    on_loop,
    until,
    upstream,
)

__all__ = ["folder"]  # the fixture
REQUESTS = "headgate_gateway_admitted_total"
TOLD = "headgate_gateway_process_told"


@asynccontextmanager
async def two(folder: Path, fake: Fake) -> AsyncIterator[tuple[Front, Front]]:
    async with one_of(2, folder, "0", fake) as one, one_of(2, folder, "1", fake) as other:
        yield one, other


async def answer(peer: Peer) -> None:
    await peer.stream(said("a"), said("b"), usage(), DONE)


async def page(front: Front, accept: str = "") -> str:
    response = await front.client.get("/metrics", headers={"accept": accept})
    assert response.status_code == 200
    assert int(response.headers["content-length"]) == len(response.content)
    return response.text


def samples(text: str) -> list[Sample]:
    read = read_openmetrics if text.endswith("# EOF\n") else read_plain
    return [sample for family in read(text) for sample in family.samples]


def by_process(text: str, name: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for sample in samples(text):
        if sample.name == name:
            found[sample.labels["process"]] += int(sample.value)
    return found


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
@on_loop
async def test_whichever_process_is_asked_tells_of_all(folder: Path, accept: str) -> None:
    """Each sample is one process's, under a label that says which; each metric has one head; the
    sum is what clients have sent; exemplars of all are there."""
    async with upstream(answer) as fake, two(folder, fake) as (one, other):
        traces = []
        for at, front in enumerate((one, one, other, one, other)):
            traces.append(f"{at + 1:032x}")
            headers = {"traceparent": f"00-{traces[-1]}-00f067aa0ba902b7-01"}
            await front.post(STREAMED, headers=headers)
        for front in (one, other):
            await until(lambda front=front: not front.pool.in_flight)
        for front in (one, other):
            text = await page(front, accept)
            assert by_process(text, REQUESTS) == {"0": 3, "1": 2}
            assert by_process(text, TOLD) == {"0": 1, "1": 1}
            assert all("process" in sample.labels for sample in samples(text))
            heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
            assert len(heads) == len(set(heads))
            series = [(sample.name, *sorted(sample.labels.items())) for sample in samples(text)]
            assert len(series) == len(set(series))
            named = {s.exemplar.labels["trace_id"] for s in samples(text) if s.exemplar}
            assert bool(named) == bool(accept)
            assert named <= set(traces)


@on_loop
async def test_one_process_alone_has_no_label_of_it() -> None:
    """And its page can be asked for without the page, as every other."""
    async with upstream(answer) as fake, gateway(fake) as front:
        await front.post(STREAMED)
        text = await page(front)
        head = await front.client.head("/metrics")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 0
    assert "process=" not in text
    assert TOLD not in text


@on_loop
async def test_one_that_is_missing_is_told_and_delays_nobody(folder: Path) -> None:
    """One that was never started, one that hangs, one that breaks in the middle of its answer (none
    of which is believed): the page is there soon, and says whose samples are not."""
    clock = asyncio.get_running_loop().time
    async with (
        upstream(answer) as fake,
        one_of(4, folder, "0", fake) as front,
        saying(folder / "1.sock", None),
        saying(
            folder / "2.sock", b'[[["a_total","# TYPE a_total counter\\n",10]],12]\na_total 1\n'
        ),
    ):
        await front.post(STREAMED)
        began = clock()
        text = await page(front)
        took_s = clock() - began
    assert by_process(text, TOLD) == {"0": 1, "1": 0, "2": 0, "3": 0}
    assert by_process(text, REQUESTS) == {"0": 1}
    assert "a_total" not in text
    assert SILENT_S - 0.001 <= took_s < SILENT_S + 5  # timers go by the millisecond


@on_loop
async def test_what_a_sibling_of_another_version_tells_stands_beside(folder: Path) -> None:
    """Another text for a metric that is known makes no second head; one that is not has its own."""
    parts = [
        ("headgate_gateway_admitted", "# HELP x Old words.\n", REQUESTS + '{process="1"} 7\n'),
        ("new", "# HELP new New.\n# TYPE new gauge\n", 'new{process="1"} 3\n'),
    ]
    heads = [(name, head, len(text)) for name, head, text in parts]
    body = "".join(text for *_, text in parts).encode()
    words = orjson.dumps([heads, len(body)]) + b"\n" + body + b"null\n"
    async with (
        upstream(answer) as fake,
        one_of(2, folder, "0", fake) as front,
        saying(folder / "1.sock", words),
    ):
        text = await page(front)
    assert by_process(text, REQUESTS)["1"] == 7
    assert by_process(text, "new") == {"1": 3}
    assert "Old words" not in text


@asynccontextmanager
async def saying(path: Path, words: bytes | None) -> AsyncIterator[None]:
    """A sibling that answers so, whatever it is asked; None: nothing, and it stays."""
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        if words is None:
            await gone.wait()
        else:
            writer.write(words)
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        gone.set()
        server.close()


@on_loop
async def test_traffic_adds_no_series_in_any_process(folder: Path) -> None:
    async with upstream(answer) as fake, two(folder, fake) as (one, other):
        for front in (one, other):
            for body in (STREAMED, STREAMED | {"model": "nobody's"}):
                await front.post(body)
        before = names(await page(one))
        for number in range(20):
            await strange((one, other)[number // 2 % 2], number)
        assert names(await page(other)) == before


def names(text: str) -> set[tuple[object, ...]]:
    return {(sample.name, *sorted(sample.labels.items())) for sample in samples(text)}


@on_loop
async def test_large_pages_of_siblings_come_whole_while_streams_go_on(folder: Path) -> None:
    """Megabytes, of which others on the loop let a piece at a time."""
    turns = 0

    async def turning() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with upstream(answer) as fake, two(folder, fake) as (one, other):
        for front in (one, other):
            duration_s = front.live.edge.meters.duration_s
            for number in range(1000):
                duration_s.observe(("standard", f"m{number}", "baseline"), 0.05)
        task = asyncio.ensure_future(turning())
        text = await page(one)
        task.cancel()
    assert len(text) > 4 * PIECE_BYTES
    assert by_process(text, "gen_ai_server_request_duration_seconds_count") == {
        "0": 1000,
        "1": 1000,
    }
    assert turns > 10
