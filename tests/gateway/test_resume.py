"""What a broken stream has said, how it is asked for again, how two streams become one."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

from gateway.call import CHAT_PATH, COMPLETIONS_PATH, Call, parse_call
from gateway.journal import Journal
from gateway.splice import Diverged, Splice, Way, continuation, resumable, ways
from runtime.wire import DONE
from tests.gateway.scripted import ASKED, TEXT, TOKENS, Engine


def call(path: str = CHAT_PATH, **change: Any) -> Call:
    body = {name: value for name, value in (ASKED | change).items() if value is not None}
    return parse_call(path, json.dumps(body).encode(), [], "req_1")


def said(*texts: str, ids: list[int] | None = None) -> Journal:
    """A journal of an answer so far."""
    journal, engine = Journal(), Engine("a")
    for at, text in enumerate(texts):
        told = f": token-ids {ids[at]}\n\n".encode() if ids else b""
        for _, chunk, of_it in journal.take(told + engine.chunk({"content": text})):
            assert chunk is not None
            journal.note(chunk, of_it)
    return journal


END = st.sampled_from([b"\n\n", b"\r\n\r\n"])
texts = st.lists(st.text(max_size=6), min_size=1, max_size=8)


@given(texts, END, st.lists(st.integers(0, 2000), max_size=12))
def test_events_are_the_same_however_they_are_split(
    texts: list[str], end: bytes, cuts: list[int]
) -> None:
    """Every byte of every whole event passes once and in order, but for what is told to us."""
    engine = Engine("a")
    stream, shown = b"", b""
    for at, text in enumerate(texts):
        event = engine.chunk({"content": text}).removesuffix(b"\n\n") + end
        stream += f": token-ids {at}\n\n".encode() + b": ping" + end + event
        shown += b": ping" + end + event
    stream, shown = stream + DONE, shown + DONE
    journal, got = Journal(), b""
    marks = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    for begin, stop in pairwise(marks):
        for raw, chunk, ids in journal.take(stream[begin:stop]):
            got += raw
            if chunk is not None:
                journal.note(chunk, ids)
                assert journal.said == "".join(texts[: len(journal.ids)])
    assert got == shown
    assert journal.said == "".join(texts)
    assert journal.ids == list(range(len(texts)))
    assert journal.done


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"<html>\n\n",
        b'data: {"error":{"message":"out of memory","code":500}}\n\n',
    ],
)
def test_an_event_that_is_none_is_a_fault_and_what_came_before_it_passes(bad: bytes) -> None:
    """Nothing behind it passes either."""
    journal, good = Journal(), Engine("a").chunk({"content": "x"})
    events = journal.take(good + bad + good)
    assert [raw for raw, *_ in events] == [good]
    assert journal.fault is not None


def test_tokens_belong_to_the_event_that_they_were_told_for() -> None:
    """One that is broken or does not come takes its tokens with it: they are said again."""
    engine = Engine("a")
    whole = b": token-ids 1\n\n" + engine.chunk({"content": "a"})
    for rest in (b": token-ids 2\n\n", b": token-ids 2\n\ndata: {\n\n", b": token-ids 2\n\ndata: "):
        journal = Journal()
        for _, chunk, ids in journal.take(whole + rest):
            assert chunk is not None
            journal.note(chunk, ids)
        assert (journal.said, journal.ids) == ("a", [1])


def test_an_error_about_the_content_is_an_answer() -> None:
    """It is the client's, as it came."""
    event = b'data: {"error":{"message":"no","code":"content_filter"}}\n\n'
    journal = Journal()
    assert [raw for raw, *_ in journal.take(event)] == [event]
    assert journal.fault is None


@pytest.mark.parametrize(
    ("kind", "change", "ids", "expected"),
    [
        ("headgate", {}, [7], [Way.TOKENS, Way.TEXT, Way.AGAIN]),
        ("headgate", {"temperature": 1}, None, [Way.TEXT]),
        ("vllm", {"temperature": 1}, [7], [Way.TEXT]),
        ("sglang", {"temperature": None, "seed": 1}, None, [Way.TEXT, Way.AGAIN]),
        ("openai", {"temperature": 1}, [7], []),
        ("openai", {}, [7], [Way.AGAIN]),
    ],
)
def test_who_can_go_on_and_how(
    kind: Any, change: dict[str, Any], ids: list[int] | None, expected: list[Way]
) -> None:
    """Tokens only at ours and where they are known; again only what is deterministic."""
    assert ways(kind, call(**change), said("x", ids=ids)) == expected


def test_before_any_text_anybody_can_say_it_from_the_beginning() -> None:
    """Sampled or not: the client has nothing of it yet."""
    assert ways("openai", call(temperature=1), said()) == [Way.AGAIN]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"stream": False}, False),
        ({"n": 2}, False),
        ({"n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}}, True),
        ({"tools": [{}]}, False),
        ({"logprobs": True}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"structured_outputs": {"regex": "a"}}, False),
    ],
)
def test_what_can_be_gone_on_with_is_text(change: dict[str, Any], *, expected: bool) -> None:
    assert resumable(call(**change)) == expected


def test_completions_of_one_prompt_can_be_gone_on_with() -> None:
    """Text or tokens; a `logprobs` of 0 asks for some."""
    plain = {"messages": None}
    assert resumable(call(COMPLETIONS_PATH, **plain, prompt="a"))
    assert resumable(call(COMPLETIONS_PATH, **plain, prompt=[1, 2]))
    assert not resumable(call(COMPLETIONS_PATH, **plain, prompt=["a", "b"]))
    assert not resumable(call(COMPLETIONS_PATH, **plain, prompt="a", logprobs=0))


def test_the_rest_is_asked_for_with_what_was_said() -> None:
    """As an open turn, behind one that the client left open, behind a prompt; tokens that were said
    are taken from the limit."""
    journal = said("The ", "end")
    body = json.loads(continuation(call(max_tokens=10, max_completion_tokens=2), journal, Way.TEXT))
    assert body["messages"][-1] == {"role": "assistant", "content": "The end"}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["max_tokens"], body["max_completion_tokens"]) == (8, 1)
    turns = [*ASKED["messages"], {"role": "assistant", "content": "Well. "}]
    open_turn = call(messages=turns, continue_final_message=True)
    body = json.loads(continuation(open_turn, journal, Way.TEXT))
    assert body["messages"][-1] == {"role": "assistant", "content": "Well. The end"}
    text = call(COMPLETIONS_PATH, messages=None, prompt="Once: ")
    assert json.loads(continuation(text, journal, Way.TEXT))["prompt"] == "Once: The end"
    told = said("The ", "end", ids=[7, 8])
    tokens = json.loads(continuation(call(max_tokens=10), told, Way.TOKENS))
    assert (tokens["begun_token_ids"], tokens["max_tokens"]) == ([7, 8], 10)


@given(st.integers(1, len(TOKENS)), st.lists(st.integers(1, len(TEXT) - 1), max_size=8))
def test_an_answer_said_again_goes_on_exactly_where_it_was(have: int, cuts: list[int]) -> None:
    """However the second replica cuts its text into chunks."""
    journal = said(*TOKENS[:have])
    had = journal.said
    splice, got = Splice(journal, Way.AGAIN), ""
    marks = [0, *sorted(set(cuts)), len(TEXT)]
    for begin, stop in pairwise(marks):
        chunk = json.loads(Engine("b").chunk({"content": TEXT[begin:stop]})[6:])
        spliced = splice.chunk(chunk)
        if spliced is not None:
            assert spliced["id"] == "chatcmpl-a"
            got += spliced["choices"][0]["delta"]["content"]
    assert had + got == TEXT


def test_behind_what_was_made_otherwise_nothing_is_exact_any_more() -> None:
    """Not even by one that is made of the same as the first."""
    exact = []
    journal = Journal()
    for fingerprint in "xxyxy":
        engine = Engine("a", fingerprint=fingerprint)
        for _, chunk, ids in journal.take(b": token-ids 7\n\n" + engine.chunk({"content": "a"})):
            assert chunk is not None
            if journal.head:
                chunk = Splice(journal, Way.TOKENS).chunk(chunk)
                assert chunk is not None
                exact.append(chunk["headgate"]["resumed"]["exact"])
            journal.note(chunk, ids)
    assert exact == [True, False, False, False]


def test_an_answer_that_ends_before_it_is_level_has_diverged() -> None:
    """The client has more of it than the second replica says."""
    splice = Splice(said("The ", "end"), Way.AGAIN)
    splice.chunk(json.loads(Engine("b").chunk({"content": "The "})[6:]))
    with pytest.raises(Diverged, match="earlier"):
        splice.chunk(json.loads(Engine("b").chunk({}, finish_reason="stop")[6:]))


def test_what_was_said_counts_as_answer_alone() -> None:
    """A replica that went on by the text has read what was said as prompt, and perhaps had it
    cached: it is no prompt to the client, and no more of that is cached than it has."""
    splice = Splice(said("The ", "quick "), Way.TEXT)
    usage = {"prompt_tokens": 11, "completion_tokens": 6, "total_tokens": 17}
    cached = {"prompt_tokens_details": {"cached_tokens": 10}}
    told = splice.chunk({"choices": [], "usage": usage | cached})
    assert told is not None
    assert told["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 8,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 9},
    }
