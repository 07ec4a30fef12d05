"""Answers that are given again: to the same request, by the same tenant, of the same deployment."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.call import CHAT_PATH, Call, parse_call
from gateway.reply import Headers, Reply
from gateway.response_cache import Answers, Entry
from policies.trimming import ResponseCache

SETTINGS = ResponseCache(tiers=("standard", "batch"), max_bytes=2**16)
GREEDY = {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}


def call(**more: Any) -> Call:
    return parse_call(CHAT_PATH, json.dumps({**GREEDY, **more}).encode(), [], "r")


def key(asked: Call, **more: Any) -> bytes | None:
    given = {"tenant": "t", "tier": "standard", "fingerprints": ["fp_1", "fp_1"], **more}
    return Answers(SETTINGS).key(asked, given["tenant"], given["tier"], given["fingerprints"])


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        (call(temperature=None), {}),
        (call(temperature=0.1), {}),
        (call(temperature=False), {}),
        (call(n=2), {}),
        (call(), {"tier": "interactive"}),
        (call(), {"fingerprints": ["fp_1", "fp_2"]}),
        (call(), {"fingerprints": ["fp_1", None]}),
        (call(), {"fingerprints": []}),
    ],
)
def test_what_has_no_one_answer_has_no_key(asked: Call, more: dict[str, Any]) -> None:
    assert key(asked, **more) is None


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        (call(messages=[{"role": "user", "content": "ho"}]), {}),
        (call(stream=True), {}),
        (call(max_tokens=3), {}),
        (call(foo_ext=1), {}),
        (call(), {"tenant": "other"}),
        (call(), {"fingerprints": ["fp_2"]}),
    ],
)
def test_what_may_be_answered_otherwise_has_another_key(asked: Call, more: dict[str, Any]) -> None:
    assert key(asked, **more) != key(call())


def test_what_stands_beside_the_question_does_not_count() -> None:
    spelled = json.dumps(dict(reversed(GREEDY.items()))).encode()
    assert key(parse_call(CHAT_PATH, spelled, [], "other")) == key(call(user="u", metadata={}))
    assert key(call(), tier="batch") == key(call())


def test_answers_are_bounded_and_expire() -> None:
    answers = Answers(SETTINGS)
    for at in range(100):
        answers.put(b"%d" % at, Entry((), b"x" * 2000, until=10.0))
    assert answers.size_bytes <= SETTINGS.max_bytes
    assert answers.get(b"0", 0.0) is None
    assert answers.get(b"99", 9.9) is not None
    assert answers.get(b"99", 10.0) is None
    answers.put(b"large", Entry((), b"x" * 2**15, until=10.0))
    assert answers.get(b"large", 0.0) is None
    while answers.size_bytes:
        answers._forget(next(iter(answers._entries)))
    assert answers.told()["entries"] == 0


ANSWER = b'{"system_fingerprint":"fp_1","choices":[{"finish_reason":"stop"}]}'


def kept(*messages: dict[str, Any]) -> Entry | None:
    """What is found after a request that was answered by these messages."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never() -> Headers:
        raise AssertionError("an answer that is not given does not count")

    async def run() -> None:
        reply = Reply(send, "1")
        assert not await recall.give(reply, never)
        for message in messages:
            await reply._send(message)

    answers = Answers(SETTINGS)
    recall = answers.recall(call(), "t", "standard", {"fp_1"}, 1.0)
    assert recall is not None
    asyncio.run(run())
    assert sent == list(messages)
    recall.keep()
    found = key(call())
    assert found is not None
    return answers.get(found, 2.0)


def start(status: int = 200) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"1")]
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_a_whole_answer_is_kept_without_what_was_one_requests_own() -> None:
    entry = kept(start(), body(ANSWER[:9], more=True), body(ANSWER[9:]))
    assert entry == Entry(((b"content-type", b"application/json"),), ANSWER, 3601.0)


@pytest.mark.parametrize(
    "messages",
    [
        (start(), body(ANSWER, more=True)),
        (start(429), body(ANSWER)),
        (start(), body(ANSWER.replace(b"fp_1", b"fp_2"))),
        (start(), body(ANSWER.replace(b'"stop"', b"null"))),
        (start(), body(ANSWER + b'data: {"error":{}}')),
        (start(), body(ANSWER + b" " * 2**14)),
        (start(), body(b"{}")),
    ],
    ids=["cut", "refused", "another deployment", "no end", "error in band", "large", "unsaid"],
)
def test_an_answer_that_is_not_sure_is_not_kept(messages: tuple[dict[str, Any], ...]) -> None:
    assert kept(*messages) is None
