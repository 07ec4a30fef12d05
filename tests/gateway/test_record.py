"""The recorder: what it keeps, for whom, and that it holds nobody up."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from evals.filler import Filler
from evals.spans import requests_of
from evals.traces import Trace, read_trace
from gateway.call import CHAT_PATH, parse_call
from gateway.genai import Exchange, span_of
from gateway.record import Recorder
from gateway.record_files import HEAD, PART, SUFFIX, Files, by_conversation, line_of
from gateway.record_sample import session_of, within_share
from gateway.redact import FORMS, blotted, blotter
from gateway.reply import Reply
from gateway.trail import Trail
from gateway.usage import Usage, usage_of
from policies.recording import REDACTED, Record
from tests.gateway.scripted import ASKED, TEXT, Engine
from tests.gateway.world import HELLO, Front, Peer, gateway, held, on_loop, until, upstream


def kept(folder: Path) -> list[dict[str, Any]]:
    """Every span in the folder's finished files."""
    lines = [
        json.loads(line)
        for file in sorted(folder.glob(f"*{SUFFIX}"))
        for line in file.read_text("utf-8").splitlines()
    ]
    return [span for line in lines for span in line["spans"]]


def policy(folder: Path, **more: Any) -> dict[str, Any]:
    return {"record": {"consent": "given", "path": str(folder), **more}}


async def settled(front: Front, requests: int) -> None:
    """Until so many have been handed to the writer, one way or the other."""
    recorder = front.live.edge.recorder
    assert recorder is not None
    await until(lambda: recorder.recorded + recorder.dropped + recorder.too_large >= requests)


# ---- over real sockets --------------------------------------------------------------------------


@on_loop
async def test_what_was_asked_and_answered_comes_back_from_the_disk(tmp_path: Path) -> None:
    """Streams and whole answers, told by the gateway's own reader of traces."""
    folder = tmp_path / "recorded"
    async with upstream(Engine("e")) as server, gateway(server, **policy(folder)) as front:
        more = {"top_p": 0.5, "stop": "never", "response_format": {"type": "text"}, "user": "me"}
        asks = {"x-session-id": "s", "x-headgate-tier": "batch", "x-request-id": "mine"}
        await front.post(ASKED | more, headers=asks)
        await front.post(ASKED | {"messages": [{"role": "user", "content": "Other."}]})
        await settled(front, 2)
    first, second = read_trace(folder).items(Filler())
    wanted = {name: ASKED[name] for name in ("model", "messages", "temperature")}
    assert first.body == wanted | {
        "top_p": 0.5, "stop": ["never"], "response_format": {"type": "text"}
    }  # fmt: skip
    assert (first.expected, first.tier) == (TEXT, "batch")
    assert first.meta["completion_tokens"] == 8
    assert first.meta["ttft_s"] > 0
    assert first.cluster == first.meta["session"] != second.cluster
    assert second.body["messages"][0]["content"] == "Other."
    span, _ = kept(folder)
    assert span["attributes"]["headgate.receipt"].startswith("rcpt_")
    assert span["attributes"]["headgate.request.id"] == "mine"
    assert json.loads(span["attributes"]["headgate.request.other"]) == {
        "response_format": {"type": "text"}
    }


@on_loop
async def test_a_whole_answer_is_recorded_too(tmp_path: Path) -> None:
    """With its tool calls, as OpenTelemetry has them."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    async def answer(peer: Peer) -> None:
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        usage = {"prompt_tokens": 5, "completion_tokens": 2}
        await peer.json({"id": "x", "model": "m", "choices": [choice], "usage": usage})

    async with upstream(answer) as server, gateway(server, **policy(tmp_path)) as front:
        await front.post(HELLO)
        await settled(front, 1)
    (span,) = kept(tmp_path)
    (said,) = json.loads(span["attributes"]["gen_ai.output.messages"])
    assert said["parts"] == [{"type": "tool_call", "id": "c", "name": "f", "arguments": "{}"}]
    assert span["attributes"]["gen_ai.response.finish_reasons"] == ["tool_calls"]
    assert span["attributes"]["gen_ai.usage.input_tokens"] == 5
    assert span["status"] == {"code": 0}


@on_loop
async def test_a_stream_that_tells_no_usage_has_one_that_is_marked(tmp_path: Path) -> None:
    """Tools that replay leave out what has no lengths."""

    async def answer(peer: Peer) -> None:
        pieces = ({"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"})
        chunks = [json.dumps({"choices": [{"index": 0, "delta": one}]}) for one in pieces]
        await peer.stream(*(f"data: {one}\n\n".encode() for one in chunks), b"data: [DONE]\n\n")

    async with upstream(answer) as server, gateway(server, **policy(tmp_path)) as front:
        await front.post(ASKED)
        await settled(front, 1)
    (span,) = kept(tmp_path)
    assert span["attributes"]["headgate.usage.estimated"] is True
    assert span["attributes"]["gen_ai.usage.input_tokens"] > 0
    assert span["attributes"]["gen_ai.usage.output_tokens"] == 2


@on_loop
async def test_nobody_is_recorded_who_has_not_agreed(tmp_path: Path) -> None:
    """`asked` wants a yes, `given` takes a no."""
    for consent, header, recorded in (
        ("asked", None, 0), ("asked", "yes", 1), ("given", "no", 0), ("given", None, 1)
    ):  # fmt: skip
        folder = tmp_path / f"{consent}-{header}"
        settings = policy(folder, consent=consent)
        async with upstream(Engine("e")) as server, gateway(server, **settings) as front:
            headers = {"x-headgate-record": header} if header else {}
            await front.post(ASKED, headers=headers)
            await settled(front, recorded)
        assert len(kept(folder)) == recorded


@on_loop
async def test_failures_are_recorded_as_such_and_not_played_again(tmp_path: Path) -> None:
    """A client that leaves has asked all the same: its request is traffic."""
    release = asyncio.Event()

    async def broken(peer: Peer) -> None:
        await peer.json({"error": {"message": "no", "code": "bad"}}, 400)

    async with upstream(broken) as server, gateway(server, **policy(tmp_path)) as front:
        await front.post(HELLO)
        await settled(front, 1)
        first = b'data: {"choices":[{"index":0,"delta":{"content":"Hel"}}]}\n\n'
        server.answer = held(release, first)
        reader, writer = await front.send(ASKED)
        await reader.readuntil(b"Hel")
        writer.transport.abort()
        await settled(front, 2)
        release.set()
    failed, left = kept(tmp_path)
    assert failed["status"] == {"code": 2}
    assert failed["attributes"]["error.type"] == "400"
    assert left["status"] == {"code": 0}
    assert left["attributes"]["error.type"] == "client_cancelled"
    assert len(read_trace(tmp_path).rows) == 1


@on_loop
async def test_a_writer_that_dies_costs_records_and_nothing_else(tmp_path: Path) -> None:
    """Answers go on; what it had written is found by the next one."""
    async with upstream(Engine("e")) as server, gateway(server, **policy(tmp_path)) as front:
        recorder = front.live.edge.recorder
        assert recorder is not None and recorder.pipe._process is not None
        await front.post(ASKED)
        await until(lambda: any(part.stat().st_size for part in tmp_path.glob(f"*{PART}")))
        os.kill(recorder.pipe._process.pid, signal.SIGKILL)
        await recorder.pipe._process.wait()
        answer = await front.post(ASKED)
        assert answer.status_code == 200
        assert (recorder.recorded, recorder.dropped) == (1, 1)
        recorder.pipe._started -= 60.0
        await front.post(ASKED)
        await until(lambda: not any(tmp_path.glob(f"*{PART}")) and bool(kept(tmp_path)))
        await front.post(ASKED)
    assert len(kept(tmp_path)) == 2


@on_loop
async def test_nothing_is_copied_where_nothing_is_recorded(tmp_path: Path) -> None:
    """What is larger than a record may be is answered, counted, and left out."""
    async with upstream(Engine("e")) as server, gateway(server) as front:
        assert front.live.edge.recorder is None
        assert (await front.post(ASKED)).status_code == 200
    large = ASKED | {"messages": [{"role": "user", "content": "x" * 2**20}]}
    async with upstream(Engine("e")) as server, gateway(server, **policy(tmp_path)) as front:
        assert (await front.post(large)).status_code == 200
        assert front.live.edge.recorder is not None
        assert front.live.edge.recorder.too_large == 1
    assert kept(tmp_path) == []


@on_loop
async def test_what_the_pipe_does_not_take_at_once_goes_later(tmp_path: Path) -> None:
    """More than a pipe holds, sent faster than anybody writes; at the end all of it is there."""
    texts = [chr(ord("A") + number) * 150_000 for number in range(30)]
    async with Recorder(Record(consent="given", path=str(tmp_path))) as recorder:
        for text in texts:
            reply = begun(Reply(nowhere, text[:9]))
            with recorder.request(call(text), [], "t", reply) or pytest.fail("not recorded"):
                await reply.whole(200, [], b"{}")
        assert recorder.pipe.waits
    asked = [row.body["messages"][1]["content"] for row in read_trace(tmp_path).items(Filler())]
    assert sorted(asked) == sorted(texts) and recorder.recorded == len(texts)


def begun(reply: Reply) -> Reply:
    """Of a request that has just come, and been read."""
    now = time.monotonic()
    reply.trail = Trail(reply.request_id, CHAT_PATH, now, now)
    return reply


async def nowhere(_message: Any) -> None:
    """Takes what would go to a client."""


class Unread:
    """A client's connection that takes everything."""

    asked = True

    def stream(self, _chunk: bytes) -> bool:
        return True

    def when_writable(self, go_on: Any) -> None:
        go_on()

    def when_gone(self, _leave: Any) -> bool:
        return True


@on_loop
async def test_a_stream_that_grows_too_large_is_let_go_of(tmp_path: Path) -> None:
    """While it runs, and what it says of its tokens at the end is still read."""
    piece = b'data: {"choices":[{"delta":{"content":"' + b"x" * 2**17 + b'"}}]}\n\n'
    usage = b'data: {"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
    async with Recorder(Record(consent="given", path=str(tmp_path))) as recorder:
        reply = begun(Reply(nowhere, "r", Unread()))
        with recorder.request(call(), [], "t", reply) or pytest.fail("not recorded"):
            await reply.begin_stream([])
            for _ in range(9):
                reply.write(piece)
            await until(lambda: not reply.keeps)
            reply.write(usage)
            reply.write(b"data: [DONE]\n\n")
        assert usage_of(reply.recent) == Usage(7, 3, None)
        assert recorder.told() == {"recorded": 0, "dropped": 0, "too_large": 1}


# ---- which requests -----------------------------------------------------------------------------


def call(text: str = "hi", **more: Any) -> Any:
    body = {"model": "m", "messages": [{"role": "system", "content": "s"}]}
    body["messages"].append({"role": "user", "content": text})  # type: ignore[attr-defined]
    return parse_call(CHAT_PATH, json.dumps(body | more).encode(), [], "r")


@settings(deadline=None)  # a busy machine is slow now and then
@given(st.text(max_size=30), st.floats(0.01, 1))
def test_a_conversation_is_recorded_whole_or_not_at_all(text: str, share: float) -> None:
    """Every turn begins with the same words, whether a session is named or not."""
    first = session_of(None, call(text).data, "t")
    turns = [
        {"role": "user", "content": text}, {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "more"},
    ]  # fmt: skip
    later = session_of(None, call(messages=turns).data, "t")
    assert first == later
    assert within_share(first, share) == within_share(later, share)
    assert session_of(None, call(text).data, "other") != first
    named = session_of(None, call("a", prompt_cache_key=text or "k").data, "t")
    assert named == session_of(None, call("b", prompt_cache_key=text or "k").data, "t")


def test_a_share_is_that_share() -> None:
    """Of many conversations; and a smaller one is part of a larger one."""
    names = [f"t/{number}" for number in range(4000)]
    some = {name for name in names if within_share(name, 0.1)}
    assert 300 < len(some) < 500
    assert some <= {name for name in names if within_share(name, 0.2)}


def test_tenants_that_are_not_named_are_not_recorded() -> None:
    class Unused:
        request_id = "r"

    recorder = Recorder(Record(consent="given", tenants=("a",)))
    reply: Any = Unused()
    assert recorder.request(call(), [], "b", reply) is None
    assert recorder.request(call(), [], "a", reply) is not None


# ---- redaction ----------------------------------------------------------------------------------

SECRETS = {
    "email": ["ann.lee+x@mail.example.org"],
    "phone": ["+49 30 1234-5678", "(415) 555-0134", "415-555-0134"],
    "card": ["4111 1111 1111 1111", "4111-1111-1111-1111", "378282246310005"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "ip": ["192.168.0.17", "2001:db8:85a3:0:0:8a2e:370:7334"],
    "key": [
        "sk-proj-abcdefghijklmnop1234", "ghp_abcdefghijklmnopqrst1234", "AKIAABCDEFGHIJKLMNOP",
        "Bearer abcdefghijklmnopqrstuvwx", "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_what_is_to_be_blotted_out_is(name: str) -> None:
    """Alone, in a sentence, and only where it is asked for."""
    assert set(SECRETS) == set(FORMS) == set(REDACTED)
    for secret in SECRETS[name]:
        for before, after in (("", ""), ("It is ", "."), ('{"a": "', '"}'), ("(", ")")):
            text = f"{before}{secret}{after}"
            assert secret not in blotter([name])(text)
            assert f"[{name}]" in blotter([name])(text)
        others = blotter(one for one in REDACTED if one != name)
        if name == "email":
            assert others(secret) == secret


def test_a_password_goes_and_its_word_stays() -> None:
    """So that a tool call's JSON stays JSON."""
    blot = blotter(["key"])
    told = json.dumps({"user": "a", "password": "hunter22", "note": "x"})
    assert json.loads(blot(told)) == {"user": "a", "password": "[key]", "note": "x"}
    assert blot("api_key=abcd1234 ok") == "api_key=[key] ok"
    assert blot("the token: it is a word") == "the token: it is a word"


@settings(deadline=None)  # a busy machine is slow now and then
@given(st.text(alphabet="aA1 .:+-@_()Z", max_size=60))
def test_a_hint_never_hides_what_a_form_would_find(text: str) -> None:
    """What is skipped for want of a word or a hint holds nothing."""
    for forms in FORMS.values():
        for form in forms:
            if re.search(form.text, text):
                small = text.lower()
                assert any(word in small for word in form.words)
                assert re.search(form.hint, text)


@settings(deadline=None)  # a busy machine is slow now and then
@given(st.text(max_size=200))
def test_blotting_twice_is_blotting_once(text: str) -> None:
    blot = blotter(REDACTED, ["secret word"])
    assert blot(blot(text)) == blot(text)


def test_ordinary_numbers_stay() -> None:
    """A replay of arithmetic has to stay arithmetic."""
    blot = blotter(REDACTED)
    for text in (
        "parcel 7532-4199, order RE-2289", "12 x 34 = 408", "1234567890123456789", "3.14.15",
        "2026-11-26 10:30:00", "version 1.2.3", "call f(a, b) at 0x7fff", "page 555 0134",
    ):  # fmt: skip
        assert blot(text) == text


def test_texts_are_blotted_wherever_they_stand() -> None:
    """Names of fields are not texts."""
    blot = blotter([], ["x+"])
    assert blotted({"xx": ["axx", {"b": "x"}], "n": 3}, blot) == {
        "xx": ["a[redacted]", {"b": "[redacted]"}], "n": 3
    }  # fmt: skip


def test_nothing_that_is_blotted_out_reaches_the_span() -> None:
    """From messages, tools, answers and what the conventions have no name for."""
    mail = "ann@example.org"
    body = {
        "model": "m", "messages": [{"role": "user", "content": mail}], "user": mail,
        "tools": [{"type": "function", "function": {"name": "f", "description": mail}}],
        "chat_template_kwargs": {"who": mail}, "metadata": {"who": mail},
    }  # fmt: skip
    pieces = ["ann@", "example", ".org"]
    stream = b"".join(
        b"data: " + json.dumps({"choices": [{"delta": {"content": one}}]}).encode() + b"\n\n"
        for one in pieces
    )
    exchange = Exchange("t", "s", "r", "", "", 0.0, 1.0, 200)
    span = span_of(exchange, body, stream, blotter(["email"]), content=True)
    assert "ann@" not in json.dumps(span)
    assert json.dumps(span).count("[email]") == 4


WORDS = st.text(max_size=12)
CALLS = st.builds(
    lambda id_, name: {
        "id": id_,
        "type": "function",
        "function": {"name": name, "arguments": "{}"},
    },
    WORDS,
    WORDS,
)
MESSAGES = st.one_of(
    st.builds(lambda text: {"role": "user", "content": text}, WORDS),
    st.builds(lambda text, name: {"role": "system", "content": text, "name": name}, WORDS, WORDS),
    st.builds(lambda text: {"role": "assistant", "content": text, "refusal": None}, WORDS),
    st.builds(
        lambda calls: {"role": "assistant", "content": None, "tool_calls": calls},
        st.lists(CALLS, min_size=1, max_size=2),
    ),
    st.builds(lambda text: {"role": "tool", "tool_call_id": "c", "content": text}, WORDS),
    st.builds(
        lambda text: {
            "role": "user",
            "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {}}],
        },
        WORDS,
    ),
)
ASKING = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(MESSAGES, min_size=1, max_size=5)}),
    st.fixed_dictionaries({"prompt": st.one_of(WORDS, st.lists(st.integers(0, 9), min_size=1))}),
)
MORE = st.fixed_dictionaries(
    {"model": st.just("m")},
    optional={
        "temperature": st.floats(0, 2), "max_tokens": st.integers(1, 99), "seed": st.integers(0, 9),
        "stop": st.lists(WORDS, max_size=2), "logit_bias": st.just({"5": -1}),
        "tools": st.just([{"type": "function", "function": {"name": "f"}}]),
        "response_format": st.just({"type": "json_object"}), "ignore_eos": st.booleans(),
    },
)  # fmt: skip


@settings(deadline=None)  # a busy machine is slow now and then
@given(ASKING, MORE)
def test_every_request_comes_back_as_it_was(asking: dict[str, Any], more: dict[str, Any]) -> None:
    """Where nothing is to be blotted out, what is replayed is what was asked."""
    body = asking | more
    exchange = Exchange("t" * 32, "s" * 16, "r", "", "", 0.0, 1.0, 200)
    span = span_of(exchange, body, b"", blotter([]), content=True)
    (one,) = requests_of(json.loads(json.dumps({"spans": [span]})))
    assert one.body == body


# ---- without texts ------------------------------------------------------------------------------


@on_loop
async def test_without_content_lengths_are_kept_and_replayed(tmp_path: Path) -> None:
    """Made-up text takes their place."""
    settings = policy(tmp_path, content=False)
    async with upstream(Engine("e")) as server, gateway(server, **settings) as front:
        await front.post(ASKED)
        await settled(front, 1)
    assert "Say it." not in json.dumps(kept(tmp_path))
    trace: Trace = read_trace(tmp_path)
    assert trace.needs_filler
    assert (trace.rows[0].prompt_tokens, trace.rows[0].output_tokens) == (9, 8)


# ---- files --------------------------------------------------------------------------------------


@settings(deadline=None)  # a busy machine is slow now and then
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99)), max_size=30))
def test_a_line_holds_a_conversation(spans: list[tuple[int, int]]) -> None:
    """Each span once, in its order; conversations in theirs; a torn line is left out."""
    lines = [line_of(f"{trace:032x}", b"%d" % span) for trace, span in spans]
    joined = [json.loads(line) for line in by_conversation([*lines, HEAD[:20]])]
    order = list(dict.fromkeys(trace for trace, _ in spans))
    assert [one["trace_id"] for one in joined] == [f"{trace:032x}" for trace in order]
    for one in joined:
        assert one["spans"] == [span for trace, span in spans if f"{trace:032x}" == one["trace_id"]]


def test_the_folder_stays_within_its_bound(tmp_path: Path) -> None:
    """The oldest files go; nobody else can read what is there."""
    folder = tmp_path / "deep" / "recorded"
    files = Files(folder, file_bytes=2000, max_bytes=10_000)
    for number in range(400):
        files.write(line_of("0" * 32, b'{"n":%d,"pad":"%s"}' % (number, b"x" * 100)))
        total = sum(file.stat().st_size for file in folder.iterdir())
        assert total <= 10_000
    files.close()
    numbers = [span["n"] for span in kept(folder)]
    assert numbers[-1] == 399
    assert numbers == list(range(numbers[0], 400))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in folder.iterdir())
    assert not list(folder.glob(f"*{PART}"))


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """Neither ends the other's file, and both name conversations alike."""
    one, two = Files(tmp_path, 2000, 10_000), Files(tmp_path, 2000, 10_000)
    one.write(line_of("0" * 32, b"1"))
    three = Files(tmp_path, 2000, 10_000)
    assert len(list(tmp_path.glob(f"*{PART}"))) == 1
    assert one.salt() == two.salt() == three.salt()
    one.close()
    assert kept(tmp_path) == [1]
