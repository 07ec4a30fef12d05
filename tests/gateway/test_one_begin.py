"""A request begins at one moment for whoever tells of it: its trace, its recording, a rollout."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import pytest

from evals.filler import Filler
from evals.traces import read_trace
from gateway.call import CHAT_PATH
from gateway.trail import Trail
from tests.gateway.test_arrival import BUSY_S, Client, busy
from tests.gateway.test_record import kept, policy
from tests.gateway.test_variants import hi, observed, put
from tests.gateway.world import STREAMED, gateway, on_loop, until, upstream

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not note it here")


@pytest.mark.parametrize(("share", "shadow"), [(1.0, 0.0), (0.0, 1.0)])
def test_traces_recordings_and_both_arms_tell_the_same_first_token(
    tmp_path: Path, share: float, shadow: float
) -> None:
    """From when its answer was due: what its client took to send it is nobody's, what it lay unread
    in its socket everybody's. Recordings and rollouts began once it was parsed."""
    body = json.dumps(STREAMED).encode()
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"

    recorded: list[Trail] = []

    @on_loop
    async def ask() -> None:
        async with (
            upstream(hi) as old,
            upstream(hi) as new,
            gateway(old, **policy(tmp_path)) as front,
        ):
            await put(front, new, share=share, shadow=shadow)
            client = Client(front)
            client.send(head.encode() + body[:9])
            await front.client.get("/health")
            busy(20 * BUSY_S)
            client.send(body[9:])
            busy()
            ring, wanted = front.live.edge.tracer.ring, 1 + int(shadow)
            await until(lambda: len(ring) == 1)
            beside = front.live.beside
            await until(lambda: beside.shadows.done == int(shadow))  # type: ignore[union-attr]
            (trail,) = ring
            seen = await observed(front)
            client.sock.close()
        assert {one.arm for one in seen} == ({"candidate"} if share else {"candidate", "baseline"})
        assert len(seen) == wanted
        assert trail.ttft_s is not None
        lay_s, took_s = trail.read - trail.due, trail.ended - trail.due
        assert BUSY_S - 0.001 <= lay_s < took_s < trail.e2e_s - 19 * BUSY_S
        for one in seen:
            assert one.ttft_s is not None
            assert one.e2e_s is not None
            assert lay_s <= one.ttft_s <= one.e2e_s
            if one.source == "live":
                assert trail.ttft_s <= one.ttft_s <= took_s <= one.e2e_s
        recorded.append(trail)

    ask()
    (trail,) = recorded
    (item,) = read_trace(tmp_path).items(Filler())
    assert item.meta["ttft_s"] == trail.ttft_s
    (span,) = kept(tmp_path)
    began = datetime.fromisoformat(span["start_time"]).timestamp()
    assert began == pytest.approx(trail.at_s(trail.due), abs=1e-5)
