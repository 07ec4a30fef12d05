"""What the gateway knows of a prompt: exactly what the runtime computes, or an honest guess."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from cache.blocks import BLOCK_TOKENS, chain_hashes
from cache.tokens import Tokenizer
from gateway.call import CHAT_PATH, COMPLETIONS_PATH, Call, parse_call
from gateway.links import Link, Memory, extend
from gateway.prompt import EXACT_BYTES_MAX, Prompt, Prompts, root
from runtime.orders import chat_prompt, completion_prompts
from runtime.wire import parse_chat, parse_completion

POCKET = Path(__file__).parents[2] / "pocket" / "target"
TOKENIZER = Tokenizer.load(POCKET)
LIMIT = 2**20
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {}, "strict": True},
}
SYSTEM = {"role": "system", "content": "Answer from the facts. Be exact and brief. " * 4}
LONG = {"role": "user", "content": "Where does order JR-9265 lie, and who packed it? " * 200}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    ],
}


def call_of(body: dict[str, Any], path: str = CHAT_PATH) -> Call:
    return parse_call(path, json.dumps({"model": "m"} | body).encode(), [], "req_1")


def prompts_of(tokenizer: Path | None = POCKET, **models: Any) -> Prompts:
    replica = SimpleNamespace(models=models or {"m": {"parent": None}}, tokenizer=tokenizer)
    return Prompts(lambda: [replica])


async def ready(prompts: Prompts, *calls: Call) -> list[Prompt]:
    async with prompts:
        await prompts.loaded()
        return [await prompts.read(call) for call in calls]


def read(*calls: Call, prompts: Prompts | None = None) -> list[Prompt]:
    return asyncio.run(ready(prompts or prompts_of(), *calls))


def computed(body: dict[str, Any]) -> list[int]:
    """The ids that a worker of ours makes of the body."""
    asked = parse_chat(json.dumps({"model": "m"} | body).encode())
    return chat_prompt(asked, TOKENIZER, LIMIT)


def expected(ids: list[int], salt: str | None = None) -> Prompt:
    hashes = tuple(chain_hashes(root("m", None, salt), ids))
    return Prompt(len(ids), hashes, exact=True)


BODIES = {
    "short": {"messages": [{"role": "user", "content": "hi"}]},
    "long": {"messages": [SYSTEM, LONG]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a b c"}]}]},
    "null content": {"messages": [LONG, CALLED, {"role": "tool", "content": "4"}]},
    "tools": {"messages": [LONG], "tools": [TOOL], "tool_choice": "auto"},
    "tools not offered": {"messages": [LONG], "tools": [TOOL], "tool_choice": "none"},
    "continued": {
        "messages": [LONG, {"role": "assistant", "content": "It lies"}],
        "continue_final_message": True,
    },
    "no generation prompt": {"messages": [LONG], "add_generation_prompt": False},
    "variables": {"messages": [LONG], "chat_template_kwargs": {"enable_thinking": False}},
    "spelled control tokens": {"messages": [SYSTEM, {"role": "user", "content": "<|im_end|>"}]},
    "salted": {"messages": [SYSTEM, LONG], "cache_salt": "tenant"},
}


@pytest.mark.parametrize("name", BODIES)
def test_a_conversation_is_hashed_as_the_worker_computes_it(name: str) -> None:
    """Whatever decides about its tokens: tools, parts, a continued message, quoted control tokens,
    template variables; and whatever keeps it apart from others."""
    body = BODIES[name]
    assert read(call_of(body)) == [expected(computed(body), body.get("cache_salt"))]


def test_text_and_ids_are_hashed_as_the_worker_computes_them() -> None:
    """Of several prompts the first one's blocks, and everybody's tokens."""
    for given_prompt in ("word " * 400, ["word " * 30, "b"], [5] * 40, [[5] * 40, [6] * 3]):
        body = {"prompt": given_prompt}
        asked = parse_completion(json.dumps({"model": "m"} | body).encode())
        ids = completion_prompts(asked, TOKENIZER, LIMIT)
        (prompt,) = read(call_of(body, COMPLETIONS_PATH))
        assert prompt.tokens == sum(map(len, ids))
        assert prompt.hashes == expected(ids[0]).hashes


texts = st.text("ab cé世<|im_end|>\n", max_size=120)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(turns)
def test_a_conversation_that_grows_is_hashed_as_if_it_were_new(pairs: list[Any]) -> None:
    """Each turn is read by the prompts that know the turns before, and by the worker."""
    messages: list[dict[str, Any]] = [SYSTEM]
    bodies = []
    for asked, answered in pairs:
        messages = [*messages, {"role": "user", "content": asked}]
        bodies.append({"messages": messages})
        messages = [*messages, {"role": "assistant", "content": answered}]
    found = read(*map(call_of, bodies))
    assert found == [expected(computed(body)) for body in bodies]


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self) -> None:
        self.chars = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)

    def encode(self, text: str, *, special: bool) -> list[int]:
        self.chars += len(text)
        return TOKENIZER.encode(text, special=special)


def test_of_a_conversation_that_has_grown_only_the_new_turn_is_tokenized() -> None:
    async def grow() -> list[int]:
        prompts, counting = prompts_of(), Counting()
        prompts._tokenizers[POCKET] = counting  # type: ignore[assignment]
        messages = [SYSTEM]
        spent = []
        for turn in range(8):
            messages = [*messages, LONG | {"content": f"{turn} {LONG['content']}"}]
            before = counting.chars
            await prompts.read(call_of({"messages": messages}))
            spent.append(counting.chars - before)
            messages = [*messages, {"role": "assistant", "content": f"In box {turn}."}]
        return spent

    spent = asyncio.run(grow())
    assert all(chars < 1.05 * len(LONG["content"]) + 100 for chars in spent[1:])


def test_an_adapter_and_a_salt_keep_blocks_apart_and_its_parent_names_the_model() -> None:
    """A LoRA's blocks stand on its base model's name and its own."""
    body = {"messages": [SYSTEM, LONG]}
    models = {"base": {"parent": None}, "tuned": {"parent": "base"}}
    found = read(
        call_of(body | {"model": "base"}),
        call_of(body | {"model": "tuned"}),
        call_of(body | {"model": "base", "cache_salt": "s"}),
        prompts=prompts_of(**models),
    )
    ids = computed(body)
    roots = [root("base", None, None), root("base", "tuned", None), root("base", None, "s")]
    assert [one.hashes for one in found] == [tuple(chain_hashes(stem, ids)) for stem in roots]


def test_without_a_tokenizer_bytes_are_counted_and_text_is_hashed() -> None:
    """Equal beginnings have equal hashes there, too, and never those of tokens."""
    longer = {"messages": [SYSTEM, LONG, {"role": "assistant", "content": "x"}, LONG]}
    first, second = read(
        call_of({"messages": [SYSTEM, LONG]}), call_of(longer), prompts=prompts_of(None)
    )
    assert not first.exact
    sizes = [len(json.dumps(one, separators=(",", ":"))) for one in (SYSTEM, LONG)]
    assert first.tokens == sum(sizes) // 4
    assert second.hashes[: len(first.hashes)] == first.hashes
    (exact,) = read(call_of({"messages": [SYSTEM, LONG]}))
    assert not set(first.hashes) & set(exact.hashes)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": ["no message"]},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [LONG], "tools": "none"},
        {"messages": [LONG], "chat_template_kwargs": {"messages": []}},
        {"messages": [LONG], "continue_final_message": True, "cache_salt": 5},
    ],
)
def test_what_no_template_can_render_is_counted_all_the_same(body: dict[str, Any]) -> None:
    """The replica will say what is wrong; the gateway only chooses one."""
    (prompt,) = read(call_of(body))
    assert not prompt.exact or prompt.hashes


@pytest.mark.parametrize("given_prompt", [[], [[]], [2**40], ["a", [1]], [None], {"a": 1}, 5])
def test_strange_prompts_of_text_completions_fail_nobody(given_prompt: Any) -> None:
    read(call_of({"prompt": given_prompt}, COMPLETIONS_PATH))


def test_a_folder_without_a_tokenizer_is_told_once_and_bytes_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = prompts_of(tmp_path)
    found = read(call_of(BODIES["long"]), call_of(BODIES["long"]), prompts=prompts)
    assert not any(one.exact for one in found)
    assert len(caplog.records) == 1
    assert prompts.report()["tokenizers_failed"] == 1


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_pieces_hash_as_their_whole(pieces: list[bytes]) -> None:
    """However a prompt's bytes are cut, its blocks are the same."""
    stem = root("m", None, None)
    apart = extend(Link(0, (), stem, b""), pieces, bytes)
    whole = extend(Link(0, (), stem, b""), [b"".join(pieces)], bytes)
    assert [one for link in apart for one in link.hashes] == list(whole[0].hashes)
    assert not apart or apart[-1].size_bytes == whole[0].size_bytes


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), max_size=40))
def test_what_is_remembered_is_bounded_and_ends_go_before_beginnings(chains: Any) -> None:
    """No prompt's end outlives its beginning: it could not be found."""
    memory = Memory(4000)
    for chain in chains:
        keys = [bytes(chain[: end + 1]) for end in range(len(chain))]
        known = memory.follow(keys)
        fresh = [Link(0, (b"h" * 32,), b"", b"")] * (len(keys) - len(known))
        memory.keep(keys, known + fresh)
        assert memory.size_bytes <= 4000
        assert all(key[:-1] in memory._links for key in memory._links if len(key) > 1)


def test_a_block_is_sixteen_tokens() -> None:
    (prompt,) = read(call_of(BODIES["long"]))
    assert len(prompt.hashes) == prompt.tokens // BLOCK_TOKENS


def test_a_text_is_counted_by_the_models_own_tokens() -> None:
    """By a quarter of its bytes, rounded up, where none are known, or where it is no text."""

    async def counted() -> list[int]:
        known = prompts_of(POCKET)
        before = known.count("m", "Where does order JR-9265 lie?")
        async with known:
            await known.loaded()
            texts = "Where does order JR-9265 lie?", "\udc80abcde"
            after = [known.count("m", text) for text in texts]
        return [before, *after]

    before, after, broken = asyncio.run(counted())
    assert before == 8
    assert after == len(TOKENIZER.encode("Where does order JR-9265 lie?", special=False)) != before
    assert broken == 2


def test_a_body_of_megabytes_is_counted_by_its_bytes() -> None:
    """Tokenizing it would take hundreds of megabytes of the gateway's memory."""
    long = "word " * (EXACT_BYTES_MAX // 5)
    small, large = read(
        call_of({"messages": [{"role": "user", "content": long[: len(long) // 8]}]}),
        call_of({"messages": [{"role": "user", "content": long}]}),
    )
    assert small.exact
    assert not large.exact
    assert large.tokens == pytest.approx(len(long) / 4, rel=0.01)
