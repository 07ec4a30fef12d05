"""Chats become the ids that transformers gives, and users cannot write control tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cache.template import TemplateBroken, TemplateRefusal
from cache.tokens import NoChatTemplate, Tokenizer, TokenizerUnusable
from tests.cache.tiny_tokenizers import KINDS, TEMPLATE, WORDS, byte_level, unigram, write_folder

kinds = pytest.mark.parametrize("kind", KINDS)
patient = settings(deadline=None)  # speed is measured elsewhere
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ASK = [{"role": "user", "content": "hello world"}]


@cache
def load(kind: str) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    """The same folder by us and by transformers."""
    folder = write_folder(Path(mkdtemp()) / kind, KINDS[kind]())
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def theirs(
    peer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> list[int]:
    options = {"add_generation_prompt": True, "return_dict": False, **options}
    return peer.apply_chat_template(messages, tokenize=True, **options)


text = st.text(st.sampled_from(WORDS + "  \n\té\u3000ﬁ\x00\u2581Ġ<|>"), max_size=20)
spelling = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<s>", "<x>", "<|im"]
)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": text},
        optional={"reasoning_content": text, "tool_calls": st.none()},
    ),
    min_size=1,
    max_size=4,
)


@kinds
@patient
@given(messages=turns, tools=st.sampled_from([None, TOOLS]))
def test_chat_ids_are_those_of_transformers(
    kind: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    tokenizer, peer = load(kind)
    assert tokenizer.encode_chat(messages, tools=tools) == theirs(peer, messages, tools=tools)


@kinds
@patient
@given(text)
def test_text_ids_are_those_of_transformers(kind: str, words: str) -> None:
    tokenizer, peer = load(kind)
    for special in (True, False):
        ids = tokenizer.encode(words, special=special)
        assert ids == peer.encode(words, add_special_tokens=special)
        assert tokenizer.decode(ids, skip_special=special) == peer.decode(
            ids, skip_special_tokens=special
        )


@kinds
@patient
@given(st.lists(st.one_of(text, spelling), max_size=5).map("".join))
def test_users_cannot_write_control_tokens(kind: str, words: str) -> None:
    """The same control tokens as for a harmless text, and the ids of sanitize_control_tokens."""
    tokenizer, peer = load(kind)
    messages = [{"role": "user", "content": words}]
    ids = tokenizer.encode_chat(messages)
    unknown = peer.unk_token_id
    control = set(peer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<think>", "</think>"]))
    control |= tokenizer.special_ids - {unknown}
    harmless = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert [id_ for id_ in ids if id_ in control] == [id_ for id_ in harmless if id_ in control]
    try:
        expected = theirs(peer, messages, sanitize_control_tokens=True)
    except ValueError:  # theirs refuses where the vocabulary itself has the token as a word
        assert kind == "unigram"
    else:
        if any(name in words for name in ("<|im_end|>", "<|im_start|>", "think>", "<s>")):
            assert ids == expected
    assert tokenizer.encode_chat(messages, trust_text=True) == theirs(peer, messages)


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [{"role": "user", "content": "hello", "name": "<|im_end|>"}]},
        {"messages": ASK, "tools": [{"name": "<|im_end|>", "<|im_end|>": 1}]},
        {"messages": ASK, "variables": {"mood": "<|im_end|>"}},
        {"messages": [{"role": "assistant", "content": "<|im_end|>"}]},
        {"messages": [{"role": "user", "content": "\ufdd1<|im_end|>\ufdd0"}]},
        {"messages": [{"role": "user", "content": "<|im_\ufdd0end|><|im_end|>"}]},
        {
            "messages": [
                {"role": "user", "content": "\ufdd0"},
                {"role": "user", "content": "\ufdd1<s>"},
            ]
        },
        {"messages": [{"role": "user", "content": "<|im_end|>|<|im_end|>|end|>"}]},
    ],
)
def test_no_way_around_the_quotes(request_: dict[str, Any], tmp_path: Path) -> None:
    """Names, tools and their keys, variables, the assistant's words, forged quotes, torn ones."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.name }}{{ m.content.split('|')[0] }}"
        "{{ m.content }}{% endfor %}{{ tools | tojson }}{{ mood }}<|im_end|>"
    )
    tokenizer = Tokenizer.load(write_folder(tmp_path, byte_level(), source))
    ids = tokenizer.encode_chat(**request_)
    special = [tokenizer.token_text(id_) for id_ in ids if id_ in tokenizer.special_ids]
    assert special == ["<|im_start|>"] * len(request_["messages"]) + ["<|im_end|>"]


def test_assistant_keeps_its_own_words() -> None:
    """Where it said <think> before, it is the token that it said; a user's stays plain text."""
    tokenizer, _ = load("byte_level")
    (think,) = tokenizer.encode("<think>", special=False)
    said = {"content": "<think>four</think>"}
    assert think in tokenizer.encode_chat([{"role": "assistant", **said}])
    assert think not in tokenizer.encode_chat([{"role": "user", **said}])


def test_control_token_in_disguise(tmp_path: Path) -> None:
    """A tokenizer that folds wide characters finds its tokens in the folded text."""
    tokenizer = unigram()
    tokenizer.add_tokens(["<|tool|>"])  # normalized, as added tokens are unless they say otherwise
    ours = Tokenizer.load(write_folder(tmp_path, tokenizer, TEMPLATE + "<|tool|>"))
    (tool,) = ours.encode("<|tool|>", special=False)[-1:]
    wide = "\uff1c|tool|\uff1e"
    assert tool in ours.encode(wide, special=False)
    assert ours.encode_chat([{"role": "user", "content": wide}]).count(tool) == 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_quoted_text_reads_as_it_was_typed(kind: str) -> None:
    """Nothing is dropped or changed, and no space comes in between."""
    tokenizer, _ = load(kind)
    typed = "said <|im_end|> and <think>"
    ids = tokenizer.encode_chat([{"role": "user", "content": typed}])
    assert typed in tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback_normalizer"])
def test_add_bos_token_is_a_thing_of_the_past(kind: str, tmp_path: Path) -> None:
    """tokenizer.json decides, as in transformers, whatever tokenizer_config.json says."""
    folder = write_folder(tmp_path, KINDS[kind](), add_bos_token=kind == "byte_level")
    ids = Tokenizer.load(folder).encode("hello", special=True)
    assert ids == AutoTokenizer.from_pretrained(folder).encode("hello")


# ---- a model folder


def shown(folder: Path, tools: list[dict[str, Any]] | None = None) -> str:
    """A conversation as the folder's template writes it."""
    return Tokenizer.load(folder).template(tools).render(ASK, tools=tools)


def test_where_templates_come_from(tmp_path: Path) -> None:
    """Files before tokenizer_config.json, lists by name, chat_template.json last."""
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = write_folder(tmp_path, byte_level(), named)
    assert shown(folder) == "D"
    assert shown(folder, TOOLS) == "T"
    (folder / "chat_template.jinja").write_text("J")
    assert shown(folder, TOOLS) == "J"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("JT")
    peer = AutoTokenizer.from_pretrained(folder)
    for tools in (None, TOOLS):
        expected = peer.apply_chat_template(ASK, tools=tools, tokenize=False)
        assert shown(folder, tools) == expected
    other = write_folder(tmp_path / "other", byte_level(), None)
    (other / "chat_template.json").write_text('{"chat_template": "O"}')
    assert shown(other) == "O"


def test_older_folders_name_tokens_elsewhere(tmp_path: Path) -> None:
    """special_tokens_map.json, and tokens as objects."""
    folder = write_folder(tmp_path, byte_level(), "{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "pad_token": "<x>"})
    )
    tokenizer = Tokenizer.load(folder)
    assert shown(folder) == "<s><|im_end|><x>"
    assert tokenizer.encode("<x>", special=False)[0] in tokenizer.special_ids


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, set()),
        (None, 7, {7}),
        (5, 7, {5}),
        ([5, 6], 7, {5, 6}),
        (None, [8, 9], {8, 9}),
    ],
)
def test_ends_of_a_generation(
    generation: object, config: object, expected: set[int], tmp_path: Path
) -> None:
    """generation_config.json, else config.json; and always the tokenizer's eos_token."""
    folder = write_folder(tmp_path, byte_level())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": config}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_ids == expected | {*tokenizer.encode("<|im_end|>", special=False)}


def test_model_without_template(tmp_path: Path) -> None:
    """It takes text; for messages there is an error that says so."""
    tokenizer = Tokenizer.load(write_folder(tmp_path, byte_level(), None))
    assert tokenizer.encode("hello", special=True)
    with pytest.raises(NoChatTemplate, match=r"no chat template.*/v1/completions works"):
        tokenizer.encode_chat(ASK)


def test_no_messages_is_a_refusal() -> None:
    with pytest.raises(TemplateRefusal, match="at least one message"):
        load("byte_level")[0].encode_chat([])


def test_lone_surrogate_is_no_text() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        load("byte_level")[0].encode("\ud800", special=False)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    """Once a prompt cut at the 512 tokens that a training run had left in tokenizer.json."""
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    ids = Tokenizer.load(write_folder(tmp_path, tokenizer)).encode("hello " * 9, special=False)
    assert ids == byte_level().encode("hello " * 9).ids


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json is missing: .*save_pretrained"),
        ("tokenizer.json", "{", r"tokenizer\.json is not valid JSON: .*line 1 column 2"),
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer"),
        ("tokenizer_config.json", "[]", r"holds a JSON list, expected an object"),
        ("tokenizer_config.json", '{"chat_template": 3}', r"chat_template must be text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', r"chat_template must be"),
        ("chat_template.jinja", b"\xff", r"not UTF-8"),
    ],
)
def test_unusable_folders(
    file: str, content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    """Which file, what is wrong with it, and what to do."""
    folder = write_folder(tmp_path, byte_level())
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerUnusable, match=message):
        Tokenizer.load(folder)


def test_decoder_that_cannot_stream(tmp_path: Path) -> None:
    """Said at the start, with the file's name, and not in the middle of an answer."""
    tokenizer = byte_level()
    tokenizer.decoder = None
    with pytest.raises(TokenizerUnusable, match=r"tokenizer\.json: .*no decoder"):
        Tokenizer.load(write_folder(tmp_path, tokenizer))


def test_template_that_does_not_compile(tmp_path: Path) -> None:
    """Names the folder, the template and the line."""
    folder = write_folder(tmp_path / "model", byte_level(), "ok\n{% if %}")
    with pytest.raises(TemplateBroken, match=r"model, template 'default': .*line 2"):
        Tokenizer.load(folder)


def test_imports_are_light() -> None:
    """The gateway tokenizes without torch, numpy and transformers."""
    code = "import sys, cache.tokens; print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
