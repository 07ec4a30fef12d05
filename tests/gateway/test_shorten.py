"""Trimmed requests: what is sent on, what stays untouched, where a session's cut is kept."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from cache.memory_store import MemoryStore
from cache.store import StoreDown
from gateway.call import CHAT_PATH, Call, parse_call
from gateway.shorten import TURN_TOKENS, Shortener
from gateway.trim import NOTHING
from policies.trimming import Cutting, Passages, Trim

BATCH = Trim(drop="oldest", budget_tokens=200, keep_share=0.5)


def words(_model: str, text: str) -> int:
    return len(text.split())


def ask(turns: int, **more: Any) -> Call:
    messages = [{"role": "system", "content": "be brief"}]
    for at in range(turns):
        messages.append({"role": "user", "content": f"question {at} " + "word " * 8})
        messages.append({"role": "assistant", "content": f"answer {at} " + "word " * 8})
    messages.append({"role": "user", "content": "and now?"})
    headers = [(name.encode(), value.encode()) for name, value in more.pop("headers", {}).items()]
    body = json.dumps({"model": "m", "messages": messages, "foo_ext": 1, **more}).encode()
    return parse_call(CHAT_PATH, body, headers, "r")


def trimmed(shortener: Shortener, call: Call, tier: str = "standard") -> Any:
    return asyncio.run(shortener.trim(call, "tenant", tier))


def test_what_needs_no_trimming_goes_on_as_the_bytes_that_came() -> None:
    call = ask(3)
    assert trimmed(Shortener(BATCH, words, MemoryStore()), call) == (call, None)
    assert trimmed(Shortener(Trim(), words, MemoryStore()), ask(500))[0].body == ask(500).body


def test_a_cut_request_keeps_everything_but_the_messages() -> None:
    call = ask(40, tools=[], seed=7)
    sent, about = trimmed(Shortener(BATCH, words, MemoryStore()), call)
    asked, goes = json.loads(call.body), json.loads(sent.body)
    assert goes | {"messages": asked["messages"]} == asked
    assert goes["messages"][0] == asked["messages"][0]
    assert goes["messages"][-1] == asked["messages"][-1]
    assert goes["messages"] == sent.data["messages"]
    assert about.removed_tokens > 0
    assert about.before_tokens - about.removed_tokens <= BATCH.budget_tokens


def test_a_sessions_cut_outlives_a_change_of_policy() -> None:
    """Whoever changes the budget moves no cut before its session is over the budget again."""
    store = MemoryStore()
    first = trimmed(Shortener(BATCH, words, store), ask(40))[1]
    other = Trim(drop="oldest", budget_tokens=201, keep_share=0.3)
    again = trimmed(Shortener(other, words, store), ask(40))[1]
    assert again.cut == first.cut
    assert not again.moved
    assert trimmed(Shortener(other, words, MemoryStore()), ask(40))[1].cut != first.cut


def test_a_cut_of_another_conversation_is_not_used() -> None:
    """A client that edits what it said before begins anew, under the same session."""
    store = MemoryStore()
    named = {"x-session-id": "s"}
    trimmed(Shortener(BATCH, words, store), ask(40, headers=named))
    edited = ask(40, headers=named)
    edited.data["messages"][1]["content"] = "something else"
    fresh = trimmed(Shortener(BATCH, words, MemoryStore()), edited)[1]
    assert trimmed(Shortener(BATCH, words, store), edited)[1].cut == fresh.cut


class Down(MemoryStore):
    async def get(self, key: str) -> bytes | None:
        raise StoreDown

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        raise StoreDown


def test_without_its_store_a_cut_is_the_same() -> None:
    known = trimmed(Shortener(BATCH, words, MemoryStore()), ask(60))[0]
    assert trimmed(Shortener(BATCH, words, Down()), ask(60))[0].body == known.body


def test_tiers_and_models_have_cuts_of_their_own() -> None:
    settings = Trim(
        tiers={"batch": Cutting(drop="oldest", budget_tokens=100)},
        models={"other": Cutting(drop="off")},
    )
    shortener = Shortener(settings, words, MemoryStore())
    assert trimmed(shortener, ask(40))[1] is None
    assert trimmed(shortener, ask(40), "batch")[1].removed_tokens > 0
    assert trimmed(shortener, ask(40, model="other"), "batch")[1] is None


def test_outputs_and_passages_are_shortened_before_they_are_sent() -> None:
    passages = (
        "[1] The tide is high at noon.\n\n[2] Bread is sold at six.\n\nWhen is the tide high?"
    )
    messages = [
        {"role": "user", "content": passages},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "x" * 1000},
    ]
    settings = Trim(tool_output_chars=100, passages=Passages(keep=1))
    documents = [{"text": "bread is sold"}, {"text": "the tide is high"}]
    call = ask(0, messages=messages, documents=documents)
    sent = json.loads(trimmed(Shortener(settings, words, MemoryStore()), call)[0].body)
    assert "Bread" not in sent["messages"][0]["content"]
    assert len(sent["messages"][2]["content"]) < 160
    assert sent["messages"][1] == messages[1]
    assert sent["documents"] == documents[1:]


def test_what_was_left_out_is_told_by_what_left_it_out() -> None:
    """Tokens inside outputs and passages were counted nowhere; those of a round that is cut as well
    count once, and what says that characters are missing may be longer than they were."""
    output = {"role": "tool", "tool_call_id": "1", "content": "word " * 300}
    passages = "[1] The tide is high at noon.\n\n[2] Bread is sold at six.\n\nWhen is it high?"
    asked = [{"role": "user", "content": passages}, output]
    each = {"tool_output_chars": 500, "passages": Passages(keep=1)}
    about = trimmed(Shortener(Trim(**each), words, MemoryStore()), ask(0, messages=asked))[1]
    assert (about.before_tokens, about.cut, about.moved) == (None, NOTHING, False)
    assert about.passage_tokens == len(["[2]", "Bread", "is", "sold", "at", "six."])
    assert 190 < about.tool_output_tokens < 200
    assert about.removed_tokens == about.passage_tokens + about.tool_output_tokens

    rounds = ask(40).data["messages"]
    both = Trim(drop="oldest", budget_tokens=200, **each)
    whole = [rounds[0], *asked, *rounds[1:]]
    about = trimmed(Shortener(both, words, MemoryStore()), ask(0, messages=whole))[1]
    assert about.round_tokens > 0
    assert about.removed_tokens == about.round_tokens + about.tool_output_tokens + 6
    sizes = sum(words("", str(one["content"])) + TURN_TOKENS for one in whole)
    assert about.before_tokens == sizes + TURN_TOKENS

    barely = [{"role": "tool", "content": "a " * 250 + "b"}]
    about = trimmed(Shortener(Trim(**each), words, MemoryStore()), ask(0, messages=barely))[1]
    assert about.removed_tokens == 0


def test_messages_that_are_wrong_are_the_replicas_to_refuse() -> None:
    call = ask(0, messages=["hello", 7])
    assert trimmed(Shortener(BATCH, words, MemoryStore()), call)[0] is call


def test_totals_tell_what_was_saved_and_what_it_cost() -> None:
    shortener = Shortener(BATCH, words, MemoryStore())
    for turns in range(60):
        trimmed(shortener, ask(turns))
    told = shortener.totals.told()
    assert told["prompts"] == 60
    assert 10 <= told["cuts_moved"] <= 16
    assert told["net_tokens"] == told["removed_tokens"] - told["again_tokens"] > 0
