"""Which public chat templates speak a known dialect, and how past calls get into their prompts."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cache.conversation import argument_forms, takes_text
from cache.template import ChatTemplate, TemplateFailure
from runtime.tools import dialect_of

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "chat_templates"
public = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the public chat templates in {DATA}")

KNOWN = {
    "CohereLabs/c4ai-command-r-v01#tool_use": "command_r",
    "CohereLabs/c4ai-command-r7b-12-2024#tool_use": "command_r7b",
    "Qwen/Qwen2.5-3B-Instruct": "hermes",
    "Qwen/Qwen3-1.7B": "hermes",
    "deepseek-ai/DeepSeek-R1": "deepseek",
    "ibm-granite/granite-3.0-1b-a400m-instruct": "granite",
    "ibm-granite/granite-3.1-3b-a800m-instruct": "granite",
    "meta-llama/Llama-3.1-8B-Instruct": "llama_json",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral",
}
# These speak of tools, and show none of a request's: a user has to write them into a message.
UNKNOWN = {
    "THUDM/glm-4-9b-chat-1m-hf",
    "ghost-x/ghost-7b-alpha",
    "meetkai/functionary-small-v2.5",
}
SHOWS_NO_CALLS = {name for name in KNOWN if name.startswith("ibm-granite")}
ARGUMENTS = {"city": 'O"slo, Ünion', "unit": "c"}


@cache
def templates() -> dict[str, ChatTemplate]:
    rows = map(json.loads, (DATA / "templates.jsonl").read_text("utf-8").splitlines())
    return {
        row["name"]: ChatTemplate(
            row["chat_template"],
            {name: row[name] for name in ("bos_token", "eos_token") if row[name] is not None},
        )
        for row in rows
    }


@public
def test_the_templates_that_write_calls_are_known() -> None:
    """9 of 71 speak a dialect that we read; the others that speak of tools are named here."""
    found = {name: dialect_of(one.literals) for name, one in templates().items()}
    assert {name: one.name for name, one in found.items() if one is not None} == KNOWN
    with gzip.open(DATA / "rendered.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    shown = {
        row["template"]
        for row in rows
        if row["case"] == "tools_gen" and "get_weather" in row.get("text", "")
    }
    assert shown <= set(KNOWN), "a template shows tools, and no parser reads its calls"
    assert not shown & UNKNOWN


@public
@pytest.mark.parametrize("form", [dict, json.dumps], ids=["objects", "text"])
@pytest.mark.parametrize("name", sorted(set(KNOWN) - SHOWS_NO_CALLS))
def test_past_calls_are_rendered_from_text_and_from_objects(name: str, form: Any) -> None:
    """Whatever form the template takes; an argument's own text is in the prompt, once encoded."""
    template = templates()[name]
    function = {"name": "get_weather", "arguments": form(ARGUMENTS)}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "4"},
    ]
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    tool["function"]["description"] = "Tells the weather"  # type: ignore[index]
    wants_text = template.reads_argument_text or takes_text(template.literals)
    forms = argument_forms(turns, text_first=wants_text)
    text = template.render(forms[0], tools=[tool])
    assert "get_weather" in text
    spelled = [json.dumps(ARGUMENTS["city"], ensure_ascii=escaped) for escaped in (False, True)]
    assert any(one in text for one in spelled), text


@public
@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-R1", "meetkai/functionary-small-v2.5"])
def test_a_template_that_wants_text_fails_on_objects(name: str) -> None:
    """So both forms are tried, which one comes first being a matter of speed and of dialect."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    objects, texts = argument_forms(turns, text_first=False)
    assert '{"a": 1}' in templates()[name].render(texts)
    with pytest.raises(TemplateFailure):
        templates()[name].render(objects)


def test_what_the_model_wrote_goes_back_as_it_is() -> None:
    """Arguments that are no JSON object stay what they are; a conversation without calls too."""
    plain = [{"role": "user", "content": "Hi"}]
    assert argument_forms(plain, text_first=False) == [plain]
    for arguments in ("{broken", "[1]", "5", None):
        call = {"function": {"name": "f", "arguments": arguments}}
        turns = [{"role": "assistant", "tool_calls": [call]}]
        for form in argument_forms(turns, text_first=False):
            assert form == turns
