"""The measuring client, against a server that speaks byte by byte as it is told."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks.lab.client import Recording, ask, body_of, open_session
from benchmarks.lab.report import MeasurementFailed


def event(delta=None, *, finish=None, usage=None):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"


ROLE = event({"role": "assistant", "content": ""})
USAGE = event(usage={"completion_tokens": 4})
DONE = b"data: [DONE]\n\n"


def test_times_are_those_of_the_reads_that_completed_each_event():
    """The second content is cut in two by the network; it counts when its end is there."""
    second = event({"content": "lo"})
    recording = Recording(
        10.0,
        [
            (10.1, ROLE),
            (10.2, event({"content": "Hel"}) + second[:9]),
            (10.5, second[9:]),
            (10.8, event({}, finish="length")),
            (10.9, USAGE + DONE),
        ],
    )
    answer = recording.answer()
    assert answer.text == "Hello"
    assert (answer.tokens, answer.chunks) == (4, 2)
    assert answer.opened_s == pytest.approx(0.1)
    assert answer.ttft_s == pytest.approx(0.2)
    assert answer.last_s == pytest.approx(0.8)
    assert answer.whole_s == pytest.approx(0.9)
    assert answer.tpot_s == pytest.approx(0.2)


def test_an_answer_without_text_counts_to_its_last_token():
    recording = Recording(0.0, [(0.1, ROLE), (0.4, event({}, finish="stop") + USAGE + DONE)])
    assert recording.answer().ttft_s == pytest.approx(0.4)
    assert recording.answer().chunks == 0


def test_comments_are_no_events():
    content = event({"content": "a"}, finish="stop")
    assert Recording(0.0, [(0.1, b": hi\n\n" + content + USAGE + DONE)]).answer().chunks == 1


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (event({"content": "a"}), r"without \[DONE\]"),
        (event({"content": "a"}, finish="stop") + DONE, "without its usage"),
        (USAGE + DONE, "without a finish reason"),
        (b'data: {"error": {"message": "boom"}}\n\n' + DONE, "boom"),
    ],
)
def test_an_answer_that_is_not_whole_is_never_measured(data, problem):
    with pytest.raises(MeasurementFailed, match=problem):
        Recording(0.0, [(0.1, data)]).answer()


def served(answer):
    """Asks a real socket that gives `answer` to whatever it is asked; recording and request."""
    heard = []

    async def speak(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        heard.append((head, await reader.readexactly(length)))
        for part in answer:
            writer.write(part)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def act():
        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            async with open_session() as session:
                body = body_of("m", [{"role": "user", "content": "hi"}], max_tokens=2)
                return await ask(session, f"http://127.0.0.1:{port}", body)
        finally:
            server.close()
            await server.wait_closed()

    return asyncio.run(act()), heard


def test_a_request_asks_for_a_stream_with_its_usage():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    recording, [(line, body)] = served([head, event({"content": "hi"}, finish="stop"), USAGE, DONE])
    assert recording.answer().text == "hi"
    assert line.startswith(b"POST /v1/chat/completions ")
    assert json.loads(body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 2,
    }


def test_a_refusal_is_told_with_its_words():
    said = b'{"error": "busy"}'
    head = b"HTTP/1.1 503 No\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(said)
    with pytest.raises(MeasurementFailed, match=r"503.*busy"):
        served([head + said])


def test_a_broken_connection_is_told():
    with pytest.raises(MeasurementFailed, match="a request failed"):
        served([b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf"])
