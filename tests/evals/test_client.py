"""The client over real sockets: what it says of answers, and of everything that is none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings, strategies as st

from evals.answers import Said, read_stream
from evals.client import Client, Targets
from evals.item import Item
from evals.sse import Events
from telemetry import Observation
from tests.gateway.scripted import TEXT, TOKENS, Engine
from tests.gateway.world import DONE, Answer, Peer, on_loop, upstream

ITEM = Item(
    "q-1", "c-1", 2, {"model": "m", "messages": [{"role": "user", "content": "hi"}]}, "hi", "fast"
)


def chunk(**delta: Any) -> bytes:
    finish = delta.pop("finish_reason", None)
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    payload = {"choices": [choice], "system_fingerprint": "fp_1"}
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def told(**usage: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


def ticking(step_s: float = 1.0) -> Callable[[], float]:
    """A clock that goes on by a second each time that it is read."""
    at = -step_s

    def now() -> float:
        nonlocal at
        at += step_s
        return at

    return now


async def asked(answer: Answer, item: Item = ITEM, **more: Any) -> tuple[Observation, Any]:
    """What the client observes of an answer, and the request that came."""
    async with upstream(answer) as server, Client(server.url + "/v1/", "k", **more) as client:
        seen = await client.ask(
            item, "candidate", "suite:s", 3, 1, now=asyncio.get_running_loop().time, salt="a/3"
        )
        return seen, server.requests[0] if server.requests else None


@on_loop
async def test_a_stream_is_observed_with_all_that_the_server_tells_of_it() -> None:
    """Text, usage and fingerprint; the request says whose it is and that it wants its usage."""

    async def answer(peer: Peer) -> None:
        await peer.head(x_headgate_trimmed_tokens="12", x_headgate_tier="interactive")
        for piece in (
            chunk(role="assistant", content=""),
            chunk(content="Hel"),
            chunk(content="lo"),
        ):
            await peer.chunk(piece)
        await peer.chunk(chunk(finish_reason="stop"))
        details = {"accepted_prediction_tokens": 1, "rejected_prediction_tokens": 4}
        usage = told(
            prompt_tokens=9, completion_tokens=3, prompt_tokens_details={"cached_tokens": 8},
            completion_tokens_details=details,
        )  # fmt: skip
        await peer.chunk(usage)
        await peer.chunk(DONE)
        await peer.end()

    item = Item(
        "q-1", "c-1", 2, {**ITEM.body, "max_tokens": 7}, tier="fast",
        meta={"session": "s-1", "tenant": "t"},
    )  # fmt: skip
    seen, request = await asked(answer, item, targets={"interactive": Targets(0.5, 0.03)})
    assert (seen.outcome, seen.status, seen.problem) == ("ok", 200, "")
    assert (seen.text, seen.finish_reason, seen.fingerprint) == ("Hello", "stop", "fp_1")
    assert (seen.id, seen.arm, seen.source) == ("q-1", "candidate", "suite:s")
    assert (seen.cluster, seen.turn, seen.block, seen.repeat) == ("c-1", 2, 3, 1)
    assert (seen.prompt_tokens, seen.completion_tokens, seen.cached_tokens) == (9, 3, 8)
    assert (seen.accepted_tokens, seen.rejected_tokens, seen.trimmed_tokens) == (1, 4, 12)
    assert (seen.tier, seen.tenant, seen.max_tokens) == ("interactive", "t", 7)
    assert (seen.ttft_target_s, seen.tpot_target_s) == (0.5, 0.03)
    assert seen.ttft_s is not None and seen.e2e_s is not None and 0 < seen.ttft_s <= seen.e2e_s
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer k"
    assert request.headers["x-headgate-tier"] == "fast"
    assert request.headers["x-session-id"] == "s-1"
    body = json.loads(request.body)
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert body["cache_salt"] == "a/3"


def test_moments_are_those_of_tokens_not_of_chunks_about_them() -> None:
    """A chunk with a role alone is no first token, nor is one with the finish reason a last."""
    said = Said()
    reads = [
        (1.0, chunk(role="assistant", content="")),
        (2.0, chunk(content="a")),
        (2.5, chunk(content="b") + chunk(content="c")),
        (4.5, chunk(content="d")),
        (6.0, chunk(finish_reason="length")),
        (7.0, told(prompt_tokens=1, completion_tokens=6) + DONE),
    ]
    read_stream(reads, said)
    assert (said.first, said.last, said.gap_max_s, said.chunks) == (2.0, 4.5, 2.0, 4)
    assert said.tpot_s == 0.5


def test_a_tool_call_and_reasoning_are_first_tokens_too() -> None:
    """Pieces of calls come together by their index."""
    said = Said()
    begin = {"index": 0, "id": "call_1", "function": {"name": "get", "arguments": ""}}
    reads = [
        (1.0, chunk(reasoning_content="Hm.")),
        (2.0, chunk(tool_calls=[begin])),
        (3.0, chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}])),
        (4.0, chunk(tool_calls=[{"index": 0, "function": {"arguments": " 1}"}}])),
        (5.0, chunk(finish_reason="tool_calls") + DONE),
    ]
    read_stream(reads, said)
    function = {"name": "get", "arguments": '{"a": 1}'}
    assert said.fields()["tool_calls"] == (
        {"id": "call_1", "type": "function", "function": function},
    )
    assert (said.first, said.last, said.text) == (1.0, 4.0, "")


def test_log_probabilities_of_an_echo_count_from_where_the_row_says() -> None:
    """By the tokens' own lengths: offsets of servers leave special tokens out."""
    said = Said(scored_from=3)
    logprobs = {"tokens": ["a", "<b>", "c", "d"], "token_logprobs": [None, -1.0, -2.0, -3.0]}
    told = {"index": 0, "text": "a<b>cd", "logprobs": logprobs, "finish_reason": "stop"}
    said.add({"choices": [told]}, 0.0)
    assert said.logprobs == [-2.0, -3.0]


def test_token_ids_and_logprobs_are_kept_where_they_are_told() -> None:
    """Ids from our workers' comments or from a choice; logprobs of chat and of completions."""
    own, other = Said(), Said()
    choice = {"index": 0, "text": "ab", "logprobs": {"token_logprobs": [None, -0.5]}}
    choice |= {"token_ids": [7, 8], "finish_reason": "stop"}
    logprobs = {"content": [{"token": "a", "logprob": -0.25}]}
    chat = {"index": 0, "delta": {"content": "a"}, "logprobs": logprobs}
    payload = json.dumps({"choices": [chat]}).encode()
    read_stream([(0.0, b": token-ids 5,6\n\ndata: " + payload + b"\n\n" + DONE)], own)
    read_stream([(0.0, b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")], other)
    assert (own.fields()["token_ids"], own.fields()["logprobs"]) == ((5, 6), (-0.25,))
    assert (other.fields()["token_ids"], other.fields()["logprobs"]) == ((7, 8), (-0.5,))
    assert other.text == "ab"


@on_loop
async def test_a_whole_answer_has_no_first_token() -> None:
    """`stream: false` is asked for as it says."""
    message = {"role": "assistant", "content": "Hello"}

    async def answer(peer: Peer) -> None:
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 5}
        await peer.json({"choices": [choice], "usage": usage})

    seen, request = await asked(answer, Item("a", "a", 0, {"stream": False, **ITEM.body}))
    assert (seen.text, seen.outcome, seen.ttft_s, seen.tpot_s) == ("Hello", "ok", None, None)
    assert "stream_options" not in json.loads(request.body)


@on_loop
async def test_a_prompt_is_asked_for_as_a_text_completion() -> None:
    """The path follows from the body."""

    async def answer(peer: Peer) -> None:
        await peer.stream(b'data: {"choices":[{"index":0,"text":"x"}]}\n\n', DONE)

    seen, request = await asked(answer, Item("a", "a", 0, {"model": "m", "prompt": "p"}))
    assert (request.path, seen.text, seen.ok) == ("/v1/completions", "x", True)


def refusing(status: int, code: str = "c", **headers: str) -> Answer:
    async def answer(peer: Peer) -> None:
        error = {"error": {"message": "no", "code": code}}
        await peer.json(error, status, **headers)

    return answer


@on_loop
async def test_what_is_no_answer_is_an_observation_all_the_same() -> None:
    """Each with what it was: shed load is refused, slowness is a timeout, the rest an error."""
    for answer, outcome, status in (
        (refusing(429), "refused", 429),
        (refusing(503, "overloaded"), "refused", 503),
        (refusing(503, "no_replica"), "error", 503),
        (refusing(504), "timeout", 504),
        (refusing(400), "error", 400),
        (refusing(500), "error", 500),
    ):
        seen, _ = await asked(answer)
        assert (seen.outcome, seen.status, seen.problem) == (outcome, status, "no")
        assert seen.ttft_s is None and not seen.ok


@on_loop
async def test_a_stream_that_breaks_keeps_what_came_and_is_an_error() -> None:
    """By an error in band, by an early end, by a lost connection, by junk."""

    async def in_band(peer: Peer) -> None:
        error = b'data: {"error":{"message":"gone","code":"stream_cut"}}\n\n'
        await peer.stream(chunk(content="Hel"), error, DONE)

    async def early(peer: Peer) -> None:
        await peer.stream(chunk(content="Hel"))

    async def lost(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(chunk(content="Hel"))
        peer.abort()

    async def junk(peer: Peer) -> None:
        await peer.stream(chunk(content="Hel"), b"data: {oh\n\n")

    async def other_shape(peer: Peer) -> None:
        await peer.stream(chunk(content="Hel"), b'data: {"choices":[3]}\n\n')

    for answer, words in (
        (in_band, "gone"),
        (early, "without [DONE]"),
        (lost, "Error"),
        (junk, "not JSON"),
        (other_shape, "shape"),
    ):
        seen, _ = await asked(answer)
        assert (seen.outcome, seen.text) == ("error", "Hel"), words
        assert words in seen.problem
        assert seen.ttft_s is not None


@on_loop
async def test_a_server_that_says_nothing_runs_into_the_limit() -> None:
    """What came before is kept."""
    forever = asyncio.Event()

    async def answer(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(chunk(content="Hel"))
        await forever.wait()

    seen, _ = await asked(answer, timeout_s=0.5)
    assert (seen.outcome, seen.text) == ("timeout", "Hel")
    assert "0.5 s" in seen.problem


@on_loop
async def test_nobody_there_is_an_error_and_so_is_what_cannot_be_sent() -> None:
    """Neither raises."""
    async with upstream() as server:
        url = server.url
    async with Client(url) as client:
        seen = await client.ask(ITEM, "a", "suite:s", now=ticking())
        assert (seen.outcome, seen.status) == ("error", 0)
        assert "Connect" in seen.problem
        unwritable = Item("é\n1", "c", 0, {"messages": [{"content": {1, 2}}]})
        seen = await client.ask(unwritable, "a", "suite:s", now=ticking())
        assert seen.outcome == "error" and "JSON" in seen.problem


@on_loop
async def test_an_answer_that_was_given_again_is_told_as_such() -> None:
    """By the gateway's response cache: such requests are a stratum of their own."""

    async def answer(peer: Peer) -> None:
        await peer.head(x_headgate_cache="hit")
        await peer.chunk(chunk(content="x", finish_reason="stop") + DONE)
        await peer.end()

    seen, _ = await asked(answer)
    assert seen.replica == "response_cache"


@on_loop
async def test_an_engines_stream_comes_out_as_its_text() -> None:
    """The upstream that gateway tests use."""
    engine = Engine("e")
    seen, _ = await asked(engine)
    assert (seen.text, seen.completion_tokens) == (TEXT, len(TOKENS))


@settings(deadline=None)  # a busy machine is slow now and then
@given(
    st.lists(st.text(alphabet="ab é\u2028\x0b\x85", max_size=8), max_size=6),
    st.sampled_from((b"\n", b"\r\n")),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_events_are_the_same_however_their_bytes_are_cut(
    texts: list[str], end: bytes, cuts: list[int]
) -> None:
    """No cut within a line's end or a character changes what was said."""
    whole = b"".join(
        b": note" + end + b"data: " + text.encode() + end + end for text in texts if text
    )
    events, found, begin = Events(), [], 0
    for cut in [*sorted(cuts), len(whole)]:
        found += events.feed(whole[begin:cut])
        begin = max(begin, cut)
    assert found == [text.encode() for text in texts if text]
    assert events.comments == [b"note"] * len(found)
