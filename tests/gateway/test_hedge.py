"""A second replica is asked only where it helps, and the loser is left at once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, strategies as st

from gateway.hedge import due_s, race, spare
from policies.retrying import Hedge
from tests.gateway.test_disconnect import within_naps
from tests.gateway.world import DONE, STREAMED, Answer, Peer, gateway, on_loop, until, upstream

HEDGE = {"after_s": 0.02, "ttft_s": 0.04, "budget_share": 1.0}
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


async def never(_: Peer) -> None:
    await asyncio.Event().wait()


async def quick(peer: Peer) -> None:
    await peer.stream(CHUNK, DONE)


def in_turn(*answers: Answer) -> Answer:
    """What one replica after the other does, whichever is asked first."""
    rest = iter(answers)

    async def answer(peer: Peer) -> None:
        await next(rest)(peer)

    return answer


seconds = st.floats(0.0, 10.0)


@given(seconds, st.floats(0.01, 10.0), st.none() | seconds)
def test_it_is_due_when_headroom_is_negative_and_never_before_after_s(
    after_s: float, target_s: float, predicted_s: float | None
) -> None:
    """Predicted late: at after_s. Predicted in time: not before the prediction has failed, nor
    before half of the target."""
    due = due_s(Hedge(after_s=after_s), target_s, predicted_s)
    assert due >= after_s
    if predicted_s is not None and predicted_s > target_s:
        assert due == after_s
    else:
        assert due >= max(predicted_s or 0.0, target_s / 2)


def test_capacity_to_spare_is_an_idle_replica_or_one_half_as_busy() -> None:
    """Duplicate work on an equally busy replica would only add load."""
    assert spare(0, 1)
    assert spare(2, 5)
    assert not spare(2, 4)
    assert not spare(1, 1)


@on_loop
async def test_a_race_leaves_nothing_running_and_discards_what_came_too_late() -> None:
    """Both good at once: one result, the other given to `discard`."""
    both = asyncio.Event()
    discarded: list[str] = []

    async def runner(name: str) -> str:
        await both.wait()
        return name

    async def other() -> str:
        both.set()
        return await runner("second")

    result = await race(runner("first"), other, 0.001, lambda _: True, discarded.append)
    assert {result, *discarded} == {"first", "second"}


@on_loop
async def test_a_race_that_is_left_when_it_is_decided_keeps_nothing() -> None:
    """The winner's result had nobody to go to, and its place at the replica was kept for ever."""
    discarded: list[str] = []
    cancelled = asyncio.Event()

    async def loser() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
            await asyncio.sleep(60.0)
        return "loser"

    async def winner() -> str:
        return "winner"

    racing = asyncio.create_task(race(loser(), winner, 0.0, lambda _: True, discarded.append))
    await cancelled.wait()
    racing.cancel()
    await asyncio.wait([racing])
    assert racing.cancelled()
    assert discarded == ["winner"]


@on_loop
async def test_a_bad_second_does_not_spoil_a_good_first() -> None:
    """The second fails at once, the first succeeds later; a bad result of the second is thrown."""
    discarded: list[str] = []
    late = asyncio.Event()

    async def first() -> str:
        await late.wait()
        return "good"

    async def second() -> str:
        late.set()
        return "bad"

    result = await race(first(), second, 0.001, lambda text: text == "good", discarded.append)
    assert (result, discarded) == ("good", ["bad"])


@on_loop
async def test_the_second_replica_answers_and_the_first_is_left_at_once() -> None:
    """The client gets the quick one's stream; the slow one's work is cancelled in < 50 ms."""
    answer = in_turn(never, quick)
    async with (
        upstream(answer) as one,
        upstream(answer) as two,
        gateway(one, two, hedge=HEDGE) as edge,
    ):
        response = await edge.post(STREAMED)
        assert response.content == CHUNK + DONE
        await within_naps(lambda: one.running + two.running == 0)
        assert one.was_left or two.was_left
        assert len(one.requests) == len(two.requests) == 1
        assert [replica.circuit.in_a_row for replica in edge.pool.replicas] == [0, 0]


@on_loop
async def test_a_client_that_leaves_ends_both_attempts() -> None:
    """In < 50 ms, as if there were one."""
    async with (
        upstream(never) as one,
        upstream(never) as two,
        gateway(one, two, hedge=HEDGE) as edge,
    ):
        _, writer = await edge.send(STREAMED)
        await until(lambda: one.running == two.running == 1)
        writer.transport.abort()
        await within_naps(lambda: one.running + two.running == 0)


@pytest.mark.parametrize("more", [{"budget_share": 0.05}, {"ttft_s": 60.0}])
@on_loop
async def test_no_second_attempt_beyond_the_budget_or_with_headroom(more: dict[str, float]) -> None:
    """A share of one in twenty allows none of a single request; a minute's target is far away."""
    release = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await release.wait()
        await quick(peer)

    async with (
        upstream(slow) as one,
        upstream(slow) as two,
        gateway(one, two, hedge=HEDGE | more) as edge,
    ):
        waiting = asyncio.create_task(edge.post(STREAMED))
        await until(lambda: one.running + two.running == 1)
        await asyncio.sleep(0.1)  # five times what would do
        assert one.running + two.running == 1
        release.set()
        assert (await waiting).content == CHUNK + DONE
