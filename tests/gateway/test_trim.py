"""Cuts of conversations: they move rarely, are the same whoever asks, and break nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given, strategies as st

from gateway.trim import INSTRUCTIONS, Cut, Message, apply, mask_tool_output, trim
from policies.trimming import Cutting

OLDEST = Cutting(drop="oldest", budget_tokens=1000, keep_share=0.5)
MIDDLE = Cutting(drop="middle", budget_tokens=1000, keep_share=0.5, head_share=0.6)
SLIDE = Cutting(drop="oldest", budget_tokens=1000, keep_share=1.0)


def say(role: str, **more: Any) -> Message:
    return {"role": role, "content": "x", **more}


def call(name: str) -> Message:
    function = {"name": "f", "arguments": "{}"}
    return say("assistant", tool_calls=[{"id": name, "type": "function", "function": function}])


def result(name: str) -> Message:
    return say("tool", tool_call_id=name)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Message], list[int]]:
    """Instructions, then rounds of a question, tool calls with their results, and an answer."""
    messages = [say("system")] * draw(st.integers(0, 1))
    for at in range(draw(st.integers(1, 12))):
        messages += [say("user")] * draw(st.integers(1, 2))
        for exchange in range(draw(st.integers(0, 4))):
            names = [f"{at}.{exchange}.{n}" for n in range(draw(st.integers(1, 2)))]
            function = {"name": "f", "arguments": "{}"}
            calls = [{"id": name, "type": "function", "function": function} for name in names]
            messages.append(say("assistant", tool_calls=calls))
            messages += [result(name) for name in names]
        messages.append(say("assistant"))
        if draw(st.booleans()) and at % 5 == 4:
            messages.append(say("system"))
    messages.append(say("user"))
    sizes = draw(st.lists(st.integers(1, 300), min_size=len(messages), max_size=len(messages)))
    return messages, sizes


cuttings = st.builds(
    Cutting,
    drop=st.sampled_from(["oldest", "middle"]),
    budget_tokens=st.integers(64, 2000),
    keep_share=st.floats(0.1, 1),
    head_share=st.floats(0, 0.9),
)


def ends(messages: list[Message]) -> list[int]:
    """Lengths at which a client sends: what comes next is an answer."""
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    return [*answers, len(messages)]


@given(conversations(), cuttings)
def test_what_stays_is_a_conversation(
    made: tuple[list[Message], list[int]], cutting: Cutting
) -> None:
    """Instructions and the last message stay, each result has its call, roles follow as before."""
    messages, sizes = made
    for end in ends(messages):
        cut = trim(messages[:end], sizes[:end], 10, cutting).cut
        kept = apply(messages[:end], cut)
        assert [m for m in kept if m["role"] in INSTRUCTIONS] == [
            m for m in messages[:end] if m["role"] in INSTRUCTIONS
        ]
        assert kept[-1] is messages[end - 1]
        called: set[str] = set()
        for message in kept:
            if message["role"] == "tool":
                assert message["tool_call_id"] in called
            called = (
                {one["id"] for one in message["tool_calls"]}
                if message.get("tool_calls")
                else called
                if message["role"] == "tool"
                else set()
            )
        talk = [m["role"] for m in kept if m["role"] in ("user", "assistant") and m["content"]]
        follows = pairwise(talk)
        before = [m["role"] for m in messages[:end] if m["role"] in ("user", "assistant")]
        allowed = set(pairwise(before))
        assert set(follows) <= allowed
        assert any(m["role"] == "user" for m in kept)


@given(conversations(), cuttings)
def test_a_cut_is_the_same_whether_it_was_kept_or_is_found_again(
    made: tuple[list[Message], list[int]], cutting: Cutting
) -> None:
    """A gateway that lost its memory, or another one, cuts at the same place."""
    messages, sizes = made
    kept: Cut | None = None
    for end in ends(messages):
        found = trim(messages[:end], sizes[:end], 10, cutting)
        kept = trim(messages[:end], sizes[:end], 10, cutting, kept).cut
        assert found.cut == kept
        removed = sum(
            size
            for at, size in enumerate(sizes[:end])
            if kept.leaves_out(at) and messages[at]["role"] not in INSTRUCTIONS
        )
        assert found.removed_tokens == removed
        assert found.before_tokens == 10 + sum(sizes[:end])


def turns(count: int, tokens: int = 40) -> tuple[list[Message], list[int]]:
    messages = [say("system")]
    for _ in range(count):
        messages += [say("user"), say("assistant")]
    return [*messages, say("user")], [tokens] * (2 * count + 2)


def cuts(cutting: Cutting, count: int = 60) -> list[Any]:
    messages, sizes = turns(count)
    return [trim(messages[:end], sizes[:end], 0, cutting) for end in ends(messages)]


def test_a_cut_moves_once_in_many_turns_and_slides_in_every_one() -> None:
    """The whole point: a slide of the oldest changes the prefix in every turn."""
    assert sum(one.moved for one in cuts(OLDEST)) == 7
    assert sum(one.moved for one in cuts(MIDDLE)) == 7
    assert sum(one.moved for one in cuts(SLIDE)) == 49


def test_the_budget_holds_where_rounds_are_small_enough() -> None:
    for cutting in (OLDEST, MIDDLE, SLIDE):
        sent = [one.before_tokens - one.removed_tokens for one in cuts(cutting)]
        assert max(sent) <= cutting.budget_tokens


def test_the_middle_keeps_the_first_rounds_for_good() -> None:
    starts = {one.cut.start for one in cuts(MIDDLE) if one.removed_tokens}
    assert len(starts) == 1
    assert starts.pop() > 1


def test_net_saving_tells_the_slide_from_the_batch() -> None:
    """Both send less; behind a slide nearly everything is prefilled again."""
    slide, batch = (cuts(which) for which in (SLIDE, OLDEST))
    assert sum(one.again_tokens for one in slide) > 6 * sum(one.again_tokens for one in batch)
    net = [sum(one.removed_tokens - one.again_tokens for one in way) for way in (batch, slide)]
    assert net[0] > net[1]


def test_a_long_last_round_gives_up_tool_calls_that_are_over() -> None:
    """An agent's loop: the question stays, and so does the last call with its result."""
    messages = [say("system"), say("user")]
    for at in range(30):
        messages += [call(str(at)), result(str(at))]
    sizes = [20] * len(messages)
    cut = trim(messages, sizes, 0, OLDEST).cut
    kept = apply(messages, cut)
    assert kept[:2] == messages[:2]
    assert kept[-2:] == messages[-2:]
    assert sum(sizes[: len(kept)]) <= OLDEST.budget_tokens
    assert cut.inner_start == 2


def test_a_head_ends_where_little_of_a_block_is_lost() -> None:
    """Of the rounds that may end the head, the one nearest behind a block's end."""
    messages, _ = turns(120)
    sizes = [16] + [37, 40] * 120 + [37]
    start = trim(messages, sizes, 0, Cutting(drop="middle", budget_tokens=8000)).cut.start
    ends_at = sum(sizes[:start])
    assert ends_at % 16 < 4


def test_a_masked_output_is_the_same_every_time_and_short() -> None:
    long = {"role": "tool", "tool_call_id": "1", "content": "".join(map(str, range(2000)))}
    masked = mask_tool_output(long, 300)
    assert masked == mask_tool_output(long, 300)
    assert len(masked["content"]) < 360
    assert masked["content"].startswith("0123") and masked["content"].endswith("19981999")
    assert "characters left out" in masked["content"]
    short = {"role": "tool", "content": "x" * 300}
    assert mask_tool_output(short, 300) is short
    user = {"role": "user", "content": "x" * 3000}
    assert mask_tool_output(user, 300) is user
