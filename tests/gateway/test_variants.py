"""A second edge takes a leased share of the sessions; clients notice none of its failures."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any

import pytest

from cache.memory_store import MemoryStore
from gateway.edge import Live, build
from gateway.lane import Lane
from gateway.observe import LOOP_CHARS, looped
from gateway.orders import RECORD, Orders, current
from gateway.phases import spent
from gateway.replica import Replica
from gateway.state import State
from gateway.variant import drawn
from policies.admin import Admin
from policies.schema import Deployment, Gateway, Runtime
from telemetry import Observation
from tests.gateway.scripted import ASKED, TEXT, Engine, cut, heard
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Fake,
    Front,
    Peer,
    gateway,
    held,
    listening,
    on_loop,
    until,
    upstream,
)

PATH = "/admin/variants/candidate"
SAID = b'data: {"system_fingerprint":"fp","choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'


async def hi(peer: Peer) -> None:
    """A short answer with text."""
    if json.loads(peer.request.body).get("stream"):
        await peer.stream(SAID, DONE)
    else:
        await peer.json({"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]})


async def broken(peer: Peer) -> None:
    await peer.json({"error": {"message": "out of memory"}}, status=500)


async def steer(front: Front, method: str, path: str = PATH, **body: Any) -> Any:
    answer = await front.client.request(method, path, content=json.dumps(body))
    return answer.status_code, answer.json()


async def put(front: Front, *replicas: Fake, **more: Any) -> Any:
    """A candidate that has been found ready."""
    wanted = {"id": "r1", "name": "h", "replicas": [{"url": one.url} for one in replicas]}
    status, told = await steer(front, "PUT", **wanted | {"share": 1.0, "lease_s": 60} | more)
    assert status == 200, told
    return told["candidate"]


async def observed(front: Front) -> list[Observation]:
    """All that was seen."""
    await asyncio.sleep(0)
    told = (await front.client.get("/admin/observations")).json()
    return [Observation.of(one) for one in told["observations"]]


async def told(front: Front) -> Any:
    return (await front.client.get("/admin/variants")).json()["candidate"]


@on_loop
async def test_a_session_stays_with_its_arm_and_larger_shares_keep_it() -> None:
    """Of 200 sessions about half go to the candidate; with 80 % those are still there."""
    async with upstream(hi) as old, upstream(hi) as new, gateway(old) as front:
        await put(front, new, share=0.5)
        arms: dict[str, str] = {}
        for _ in range(2):
            for at in range(200):
                answer = await front.post(HELLO, headers={"x-session-id": f"s{at}"})
                arm = answer.headers.get("x-headgate-variant", "baseline")
                assert arms.setdefault(f"s{at}", arm) == arm
        assert 70 <= Counter(arms.values())["candidate"] <= 130
        assert len(new.requests) == 2 * Counter(arms.values())["candidate"]
        await steer(front, "PATCH", id="r1", share=0.8, lease_s=60)
        for session in [one for one, arm in arms.items() if arm == "candidate"]:
            answer = await front.post(HELLO, headers={"x-session-id": session})
            assert answer.headers["x-headgate-variant"] == "candidate"


@on_loop
async def test_turns_of_a_conversation_without_a_name_stay_together() -> None:
    """By its first user message; another first message is another conversation."""
    async with upstream(hi) as old, upstream(hi) as new, gateway(old) as front:
        await put(front, new, share=0.5)
        seen = set()
        for first in range(20):
            turns: list[dict[str, str]] = [{"role": "user", "content": f"question {first}"}]
            arms = set()
            for _ in range(3):
                answer = await front.post({"model": "m", "messages": turns})
                arms.add(answer.headers.get("x-headgate-variant", "baseline"))
                turns += [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "?"}]
            assert len(arms) == 1
            seen |= arms
        assert seen == {"baseline", "candidate"}


@on_loop
async def test_a_candidate_is_asked_with_keys_that_the_policy_names_and_with_no_other_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every gateway would read its record, and send what is in `HOME` to whoever it names. One that
    is not set is refused, too, and neither leaves anything."""
    monkeypatch.setenv("HEADGATE_TEST_KEY", "secret")
    keys = ["HEADGATE_TEST_KEY", "HEADGATE_TEST_NOT_SET"]
    admin = {"candidate_keys": keys}
    async with upstream(hi) as old, upstream(hi) as new, gateway(old, admin=admin) as front:
        wanted = {"id": "r1", "name": "h", "share": 1.0, "lease_s": 60}
        for name in ("HOME", "HEADGATE_TEST_NOT_SET"):
            servers = [{"url": new.url, "api_key_env": name}]
            status, answer = await steer(front, "PUT", **wanted, replicas=servers)
            assert (status, answer["error"]["param"]) == (400, "replicas[].api_key_env")
            assert name in answer["error"]["message"]
            assert await told(front) is None
        servers = [{"url": new.url, "api_key_env": "HEADGATE_TEST_KEY"}]
        assert (await steer(front, "PUT", **wanted, replicas=servers))[0] == 200
        await front.post(HELLO)
    assert [one.headers["authorization"] for one in new.requests] == ["Bearer secret"]


@pytest.mark.parametrize("payload", [HELLO, STREAMED])
def test_what_the_candidate_fails_at_the_baseline_answers(payload: dict[str, Any]) -> None:
    """Clients get 200 from the first failure on; after three the candidate is out, and why is told.
    A failure counts against the candidate, and a rescued request for nobody."""

    @on_loop
    async def run() -> None:
        async with upstream(hi) as old, upstream(broken) as new, gateway(old) as front:
            await put(front, new)
            for _ in range(8):
                answer = await front.post(payload)
                assert answer.status_code == 200
                assert b"Hi" in answer.content
                assert "=-" not in answer.headers["server-timing"]
                assert "x-headgate-variant" not in answer.headers
                assert len(answer.headers.get_list("x-headgate-receipt")) == 1
            state = await told(front)
            assert "answers failed: error 502" in state["ended"]
            assert state["share"] == 0
            seen = await observed(front)
            assert [one.outcome for one in seen if one.arm == "candidate"] == ["error"] * 3
            for trail in front.live.edge.tracer.ring:
                assert min(spent(trail)) >= 0, "what the candidate took counts once"
                assert trail.answered is trail.hops[-1]
            assert len([one for one in seen if one.arm == "baseline"]) == 5

    run()


@on_loop
async def test_a_candidate_that_says_nothing_is_given_up_in_time() -> None:
    """Before its first byte; the client waits for the patience and gets the baseline's answer."""

    async def silent(_peer: Peer) -> None:
        await asyncio.Event().wait()

    async with (
        upstream(hi) as old,
        upstream(silent) as new,
        gateway(old, admin={"patience_s": 0.1}) as front,
    ):
        await put(front, new)
        answer = await front.post(STREAMED)
        assert answer.content == SAID + DONE
        (seen,) = await observed(front)
        assert (seen.arm, seen.outcome, seen.status) == ("candidate", "timeout", 504)


@on_loop
async def test_it_degrades_after_200_requests_under_load_and_no_client_sees_it() -> None:
    """Sixteen clients at once; the 201st request of the candidate and all behind it fail."""
    count = 0

    async def degrading(peer: Peer) -> None:
        nonlocal count
        count += 1
        await (hi if count <= 200 else broken)(peer)

    async with upstream(hi) as old, upstream(degrading) as new, gateway(old) as front:
        await put(front, new, share=0.5)
        statuses: Counter[int] = Counter()

        async def client(name: int) -> None:
            for at in range(60):
                answer = await front.post(STREAMED, headers={"x-session-id": f"{name} {at}"})
                statuses[answer.status_code] += b"Hi" in answer.content

        await asyncio.gather(*map(client, range(16)))
        assert statuses == {200: 960}
        state = await told(front)
        assert "failed" in state["ended"]
        failures = len(new.requests) - 200
        assert 3 <= failures <= 3 * 3 + 16  # attempts of each, and what was under way
        await until(lambda: front.live.edge.pool.in_flight == 0)
        before = len(new.requests)
        for _ in range(20):
            assert (await front.post(HELLO)).status_code == 200
        assert len(new.requests) == before


@on_loop
async def test_a_candidate_whose_worker_is_killed_serves_nobody() -> None:
    """Its connections are reset and new ones refused: all go to the baseline, the first one too."""

    async def dead(peer: Peer) -> None:
        peer.abort()

    async with upstream(hi) as old, gateway(old) as front:
        async with upstream(hi) as new:
            await put(front, new)
            assert (await front.post(HELLO)).headers["x-headgate-variant"] == "candidate"
            new.answer = dead
        for _ in range(5):
            answer = await front.post(HELLO)
            assert answer.status_code == 200
            assert "x-headgate-variant" not in answer.headers
        assert len(new.requests) < 5


@on_loop
async def test_a_stream_that_breaks_on_the_candidate_is_gone_on_with_by_the_baseline() -> None:
    """With `resume: auto` its client gets the whole text; it counts as the candidate's failure."""
    engine = Engine("a")
    async with (
        upstream(engine) as old,
        upstream(cut(engine, 3)) as new,
        gateway(Replica(old.url, own=True, kind="headgate"), resume="auto") as front,
    ):
        await put(front, replicas=[{"url": new.url, "kind": "headgate"}])
        for _ in range(4):
            answer = heard((await front.post(ASKED)).content)
            assert (answer.text, answer.error, answer.done) == (TEXT, None, 1)
        assert "failed: broken stream" in (await told(front))["ended"]
        assert len(new.requests) == 3


@on_loop
async def test_streams_under_way_end_on_the_candidate_after_a_rollback() -> None:
    """The client of the old answer gets all of it; the next request is the baseline's."""
    release = asyncio.Event()
    async with upstream(hi) as old, upstream(held(release, SAID)) as new, gateway(old) as front:
        await put(front, new)
        stream = asyncio.create_task(front.post(STREAMED))
        await until(lambda: new.running == 1)
        status, state = await steer(front, "POST", f"{PATH}/rollback", id="r1", why="told to")
        assert (status, state["candidate"]["ended"]) == (200, "told to")
        assert "x-headgate-variant" not in (await front.post(STREAMED)).headers
        assert (await steer(front, "DELETE", f"{PATH}?id=r1"))[0] == 200
        assert front.live.count == 2
        release.set()
        assert (await stream).content == SAID + DONE
        await until(lambda: front.live.count == 1)


@on_loop
async def test_without_another_word_the_lease_ends() -> None:
    """A controller that has died leaves no candidate behind, and may come back."""
    async with upstream(hi) as old, upstream(hi) as new, gateway(old) as front:
        await put(front, new)
        assert (await front.post(HELLO)).headers["x-headgate-variant"] == "candidate"
        await steer(front, "PATCH", id="r1", share=1.0, lease_s=0.1)
        variant: Any = front.live.beside
        await until(lambda: time.time() > variant.orders.until)
        assert "x-headgate-variant" not in (await front.post(HELLO)).headers
        assert (await told(front))["ended"] is None
        await steer(front, "PATCH", id="r1", share=1.0, lease_s=60)
        assert (await front.post(HELLO)).headers["x-headgate-variant"] == "candidate"


@on_loop
async def test_a_mirrored_request_is_answered_twice_and_given_once() -> None:
    """Both are observed under one id; whether they said the same is told, and no text."""
    async with upstream(hi) as old, upstream(hi) as new, gateway(old) as front:
        await put(front, new, share=0.0, shadow=1.0)
        answer = await front.post(STREAMED, headers={"x-request-id": "one"})
        assert answer.content == SAID + DONE
        assert "x-headgate-variant" not in answer.headers
        variant: Any = front.live.beside
        await until(lambda: variant.shadows.done == 1)
        by_arm = {one.arm: one for one in await observed(front)}
        pair = by_arm["baseline"], by_arm["candidate"]
        assert {one.id for one in pair} == {"one"}
        assert {one.text for one in pair} == {""}
        assert [one.source for one in pair] == ["live", "shadow"]
        assert by_arm["candidate"].scores == {"bad_output": 0.0, "same": 1.0}
        assert by_arm["candidate"].ttft_s is not None
        assert by_arm["candidate"].replica == new.url


@on_loop
async def test_what_a_whole_answer_took_is_seen() -> None:
    """Its usage was read and forgotten: of answers that are no stream no tokens were told."""

    async def counted(peer: Peer) -> None:
        usage = {"prompt_tokens": 9, "completion_tokens": 3}
        await peer.json({"choices": [{"message": {"content": "Hi"}}], "usage": usage})

    async with upstream(counted) as old, upstream(counted) as new, gateway(old) as front:
        await put(front, new)
        await front.post(HELLO)
        (seen,) = await observed(front)
        assert (seen.arm, seen.prompt_tokens, seen.completion_tokens) == ("candidate", 9, 3)


@on_loop
async def test_a_failing_shadow_touches_nobody_and_ends_the_rollout() -> None:
    async with upstream(hi) as old, upstream(broken) as new, gateway(old) as front:
        await put(front, new, share=0.0, shadow=1.0)
        variant: Any = front.live.beside
        for at in range(5):
            assert (await front.post(STREAMED)).content == SAID + DONE
            await until(lambda at=at: variant.shadows.done >= min(at + 1, 3))
        assert "failed" in (await told(front))["ended"]


@on_loop
async def test_another_programs_answers_end_it_at_once() -> None:
    """A fingerprint that was not judged: one answer is enough."""
    async with upstream(hi) as old, upstream(hi) as new, gateway(old) as front:
        await put(front, new, fingerprints=["other"])
        assert (await front.post(STREAMED)).status_code == 200
        assert "fingerprint fp" in (await told(front))["ended"]


@on_loop
async def test_a_worker_that_comes_back_as_something_else_gets_nothing() -> None:
    """The candidate's port answers with a fingerprint that was not ordered: it is not ready."""
    other = b'{"system_fingerprint": "other"}'
    async with upstream(hi) as old, upstream(hi, fingerprint=other) as new, gateway(old) as front:
        wanted = {"id": "r1", "name": "h", "replicas": [{"url": new.url}], "lease_s": 0.5}
        status, answer = await steer(front, "PUT", **wanted, fingerprints=["fp"], share=1)
        assert (status, answer["error"]["code"]) == (503, "candidate_not_ready")
        assert (await front.post(HELLO)).status_code == 200
        assert not new.requests


@on_loop
async def test_a_candidate_may_differ_in_the_gateway_alone() -> None:
    """The same replicas, another policy for them."""
    async with upstream(hi) as old, gateway(old) as front:
        await put(front, patch={"gateway.routing.policy": "round_robin"})
        assert (await front.post(HELLO)).headers["x-headgate-variant"] == "candidate"
        variant: Any = front.live.beside
        assert variant.edge.settings.routing.policy == "round_robin"
        assert front.live.edge.settings.routing.policy == "auto"


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ({"gateway.tenants": {}}, "gateway.tenants"),
        ({"runtime.model": "x"}, "runtime.model"),
        ({"gateway.routing.polcy": "cost"}, "polcy"),
        ({"gateway.routing.policy": "no such"}, "policy"),
    ],
)
def test_a_patch_that_cannot_be_is_refused(patch: dict[str, Any], said: str) -> None:
    @on_loop
    async def run() -> None:
        async with upstream(hi) as old, gateway(old) as front:
            status, answer = await steer(front, "PUT", id="r", name="h", patch=patch)
            assert status == 400
            assert said in answer["error"]["message"]
            assert await told(front) is None

    run()


@on_loop
async def test_what_was_rolled_back_does_not_come_back_under_its_name() -> None:
    """Nor can its lease be renewed; while one runs there is no second."""
    async with upstream(hi) as old, upstream(hi) as new, gateway(old) as front:
        await put(front, new)
        status, answer = await steer(front, "PUT", id="r2", name="h")
        assert (status, answer["error"]["code"]) == (409, "rollout_runs")
        await steer(front, "POST", f"{PATH}/rollback", id="r1", why="told to")
        status, answer = await steer(front, "PATCH", id="r1", share=1.0)
        assert (status, answer["error"]["code"]) == (409, "rollout_ended")
        status, answer = await steer(front, "PUT", id="r1", name="h")
        assert (status, answer["error"]["code"]) == (409, "rollout_ended")
        status, answer = await steer(front, "PATCH", id="r9", share=1.0)
        assert (status, answer["error"]["code"]) == (404, "rollout_not_found")


@on_loop
async def test_who_may_steer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tenants only who has the admin's key, which no tenant's is; a page never."""
    digest = "a" * 64
    tenants = {"t": {"keys": [digest]}}
    async with upstream(hi) as old:
        async with gateway(old, tenants=tenants) as front:
            answer = await front.client.get("/admin/variants")
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_off")
        monkeypatch.setenv("ADMIN_KEY", "secret")
        async with gateway(old, tenants=tenants, admin={"key_env": "ADMIN_KEY"}) as front:
            for header, status in (("Bearer secret", 200), ("Bearer other", 401)):
                answer = await front.client.get(
                    "/admin/variants", headers={"authorization": header}
                )
                assert answer.status_code == status
            assert (await front.client.get("/admin/observations")).status_code == 401
            headers = {"authorization": "Bearer secret"}
            for after in ("x", "-1", "1-2-3", "9" * 40, "%F0"):
                url = f"/admin/observations?after={after}"
                answer = await front.client.get(url, headers=headers)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
            for after in ("", "0", "1764000000000-3"):
                url = f"/admin/observations?after={after}"
                assert (await front.client.get(url, headers=headers)).status_code == 200
        async with gateway(old) as front:
            page = {"origin": "https://example.com"}
            assert (await front.client.get("/admin/variants", headers=page)).status_code == 403


@on_loop
async def test_several_processes_without_a_store_refuse_to_roll_out() -> None:
    """The others would not hear of a rollback."""
    async with upstream(hi) as old, gateway(old, processes=2) as front:
        status, answer = await steer(front, "PUT", id="r", name="h")
        assert (status, answer["error"]["code"]) == (409, "rollout_needs_store")


# ---- what needs no gateway ----------------------------------------------------------------------


def seen(arm: str = "candidate", **more: Any) -> Observation:
    return Observation("1", "live", arm, "c", **more)


def test_failures_that_both_arms_have_are_nobodys() -> None:
    lane = Lane(30.0)
    for at in range(20):
        assert lane.saw(seen("baseline", outcome="error", status=502), at / 10) is None
        assert lane.saw(seen(outcome="error", status=502), at / 10) is None


def test_failures_long_ago_do_not_count() -> None:
    lane = Lane(30.0)
    for at in range(10):
        assert lane.saw(seen(outcome="error", status=500), 20.0 * at) is None


def test_bad_answers_count_as_failures() -> None:
    lane = Lane(30.0)
    bad = seen(problem="looped", scores={"bad_output": 1.0})
    assert lane.saw(bad, 0) is None
    assert lane.saw(bad, 1) is None
    assert lane.saw(bad, 2) == "3 of its last 3 answers failed: looped"


def test_speculation_that_collapses_is_noticed() -> None:
    """0.7 of the drafted tokens were accepted for a minute, and 0.1 after that."""
    lane = Lane(30.0)
    for at in range(60):
        assert lane.saw(seen(accepted_tokens=70, rejected_tokens=30), float(at)) is None
    why = None
    for at in range(60, 120):
        why = why or lane.saw(seen(accepted_tokens=10, rejected_tokens=90), float(at))
    assert why is not None
    assert "drafted tokens are accepted" in why


def test_a_loop_is_a_short_piece_that_fills_the_end() -> None:
    assert looped(("the same " * 60)[-LOOP_CHARS:])
    assert not looped("the same")
    assert not looped("".join(f"line {at} of a list\n" for at in range(60))[-LOOP_CHARS:])


def test_shares_are_met_and_rollouts_draw_anew() -> None:
    sessions = [str(at).encode() for at in range(4000)]
    share = sum(drawn(one, "r1") < 0.05 for one in sessions) / 4000
    assert 0.035 <= share <= 0.065
    again = {one for one in sessions if drawn(one, "r1") < 0.5}
    other = {one for one in sessions if drawn(one, "r2") < 0.5}
    assert 800 <= len(again & other) <= 1200


def test_orders_come_back_from_their_record() -> None:
    orders = Orders(
        "r", "h", {"gateway.resume": "auto"}, ({"url": "http://x"},), ("fp",), share=0.5
    )
    assert Orders.read(orders.dumped()) == orders
    ended = orders.rolled_back("x", 3.0)
    assert (ended.share, ended.ended, ended.rolled_back("y", 4.0)) == (0.0, "x", ended)
    assert not ended.live(0.0)


# ---- a record that cannot be followed -----------------------------------------------------------


class Looked(MemoryStore):
    """Counts looks at the record."""

    looks = 0

    async def get(self, name: str) -> bytes | None:
        self.looks += name == RECORD
        return await super().get(name)


@pytest.mark.parametrize(
    ("replicas", "why", "traced"),
    [
        ([{"url": "http://127.0.0.1:1", "api_key_env": "HEADGATE_TEST_NOT_SET"}], "are set", False),
        ([{"url": "http://127.0.0.1:1", "api_key_env": "HOME"}], "candidate_keys", False),
        (None, "NoneType", True),  # of no version that there has been
    ],
)
@on_loop
async def test_a_record_that_cannot_be_followed_is_one_line_of_the_log_and_so_is_its_end(
    replicas: Any, why: str, traced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As another gateway may put it up, which has a key that this one lacks: this one goes on with
    the baseline, and does not fill the log, where each look fails. A traceback is for faults."""
    store = Looked()
    admin = Admin(candidate_keys=("HEADGATE_TEST_NOT_SET",))
    async with upstream(hi) as old:
        policy = Deployment(version=1, gateway=Gateway(admin=admin), runtime=Runtime())
        live = Live(build(policy, [Replica(old.url, own=True)], state=State(store)))
        async with listening(live) as front:
            await until(lambda: front.pool.replicas[0].healthy)
            orders = json.loads(Orders("r7", "h", share=1.0, until=time.time() + 60).dumped())
            record = json.dumps(orders | {"replicas": replicas}).encode()
            await store.swap(RECORD, None, record, 60)
            await _looks(store)
            assert (await front.post(HELLO)).status_code == 200
            said = [one for one in caplog.records if "followed" in one.getMessage()]
            shown = (await front.client.get("/admin/overview")).json()["rollout_lost"]
            await store.swap(RECORD, record, None, 60)
            await _looks(store)
            after = (await front.client.get("/admin/overview")).json()["rollout_lost"]
    assert len(said) == 1
    assert why in said[0].getMessage()
    assert (why in shown, after) == (True, None)
    assert bool(said[0].exc_info) == traced
    assert traced or "rollout r7 " in said[0].getMessage()
    told = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert told == [said[0].getMessage(), "this gateway can follow rollouts again"]


@on_loop
async def test_whoever_rolls_back_need_not_reach_a_gateway_that_can_follow() -> None:
    """An operator asks at one port, behind which this gateway may answer; all hear of it. Of a
    rollout that is not the record's there is none."""
    store = Looked()
    async with upstream(hi) as old:
        policy = Deployment(version=1, gateway=Gateway(), runtime=Runtime())
        live = Live(build(policy, [Replica(old.url, own=True)], state=State(store)))
        async with listening(live) as front:
            servers = ({"url": "http://127.0.0.1:1", "api_key_env": "HEADGATE_TEST_NOT_SET"},)
            orders = Orders("r7", "h", replicas=servers, share=1.0, until=time.time() + 60)
            await store.swap(RECORD, None, orders.dumped(), 60)
            await _looks(store)
            status, answer = await steer(front, "POST", f"{PATH}/rollback", id="r8", why="no")
            assert (status, answer["error"]["code"]) == (404, "rollout_not_found")
            status, _ = await steer(front, "POST", f"{PATH}/rollback", id="r7", why="told to")
            ended = await current(store)
    assert (status, ended and ended.ended, ended and ended.share) == (200, "told to", 0.0)


async def _looks(store: Looked) -> None:
    """Until the record has been looked at some times more."""
    enough = store.looks + 4
    await until(lambda: store.looks >= enough)


@on_loop
async def test_a_candidates_answer_has_a_receipt_that_can_be_read() -> None:
    async with upstream(hi) as old, upstream(hi) as new, gateway(old) as front:
        await put(front, new)
        answer = await front.post(HELLO)
        assert answer.headers["x-headgate-variant"] == "candidate"
        name = answer.headers["x-headgate-receipt"]
        found = await front.client.get(f"/v1/receipts/{name}")
        listed = (await front.client.get("/v1/receipts")).json()["data"]
    assert (found.status_code, [one["id"] for one in listed]) == (200, [name])
