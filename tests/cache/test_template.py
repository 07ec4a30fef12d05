"""Chat templates render what transformers renders, refuse what they refuse, and cannot run away."""

from __future__ import annotations

import gzip
import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cache.template import (
    ChatTemplate,
    TemplateBroken,
    TemplateFailure,
    TemplateRefusal,
    choose_template,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "chat_templates"
public = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the public chat templates in {DATA}")
RENDERED = datetime(2026, 11, 23)  # the day of rendered.jsonl.gz, which some templates write
ASK = [{"role": "user", "content": "Hi"}]
PREFILL = [*ASK, {"role": "assistant", "content": "Well, two plus "}]


@cache
def read_public() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(templates by name, cases by name, expected rows)"""
    templates = map(json.loads, (DATA / "templates.jsonl").read_text("utf-8").splitlines())
    cases = json.loads((DATA / "cases.json").read_text("utf-8"))
    with gzip.open(DATA / "rendered.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["name"]: row for row in templates}, {row["case"]: row for row in cases}, rows


def special_tokens(row: dict[str, Any]) -> dict[str, str]:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {name: row[name] for name in names if row[name] is not None}


def render(source: str, messages: list[dict[str, Any]] = ASK, **options: Any) -> str:
    return ChatTemplate(source, {}).render(messages, **options)


def expected(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    (text,), _ = render_jinja_template([messages], chat_template=source, **options)
    return text


@public
def test_public_templates() -> None:
    """71 templates by 8 conversations: the same text, or the same refusal."""
    templates, cases, rows = read_public()
    compiled = {
        name: ChatTemplate(row["chat_template"], special_tokens(row))
        for name, row in templates.items()
    }
    assert len(rows) == len(templates) * len(cases) == 568
    for row in rows:
        case = cases[row["case"]]
        try:
            text = compiled[row["template"]].render(
                case["messages"],
                tools=case.get("tools"),
                add_generation_prompt=case["add_generation_prompt"],
                variables={"date_string": "26 Jul 2024"},
                now=RENDERED,
            )
        except TemplateFailure as error:
            assert str(error).endswith(row["error"])
        except TemplateRefusal as error:
            assert f"TemplateError: {error}" == row["error"]
        else:
            assert text == row["text"], (row["template"], row["case"])


@public
def test_public_templates_with_an_open_end() -> None:
    """continue_final_message cuts where transformers cuts, or refuses where it refuses."""
    for row in read_public()[0].values():
        source, special = row["chat_template"], special_tokens(row)
        variables = {"date_string": "26 Jul 2024"}
        try:
            text = expected(source, PREFILL, continue_final_message=True, **special, **variables)
        except Exception:  # noqa: BLE001  # the other side lets out whatever a template raises
            text = None
        try:
            got = ChatTemplate(source, special).render(
                PREFILL,
                add_generation_prompt=False,
                continue_final_message=True,
                variables=variables,
            )
        except TemplateRefusal:
            got = None
        assert got == text, row["name"]


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("{{ messages[0].reasoning_content }}", [{"role": "user", "reasoning": "hm"}]),
        ("{{ messages[0].thinking }}", [{"role": "user", "reasoning_content": "hm"}]),
        ("{% for m in messages %}{% generation %}{{ m.content }}{{ loop.index }}{% endgeneration %}"
         "{% endfor %}", PREFILL),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
         "{{ loop.last }}{{ loop.length }}{{ loop.previtem.content }}{% endfor %}", PREFILL),
        ("{% for r in messages | map(attribute='role') %}{{ loop.length }}{{ r }}{% endfor %}",
         PREFILL),
        ("{% for k, v in messages[0].items() recursive %}{{ k }}={{ v }};{% endfor %}", ASK),
        ("{% for x in nothing %}{{ x }}{% else %}none{% endfor %}{{ documents is none }}", ASK),
        ("  {% if true %}\n  a\n{% endif %}\n{{ messages | tojson(indent=2) }}", ASK),
        ("{{ [1, '<é>'] | tojson }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", ASK),
        ("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(a=1) }}"
         "{{ dict.fromkeys([1, 2]) }}", ASK),
        ("{{ 2 * 3 }}{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ [0] * 2 }}{{ -1 * 2.5 }}{{ 2.0 ** -1 }}", ASK),
        ("{{ messages[0].content is string }}{{ messages[0].content[1].text }}",
         [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]),
    ],
)  # fmt: skip  # a case a line
def test_dialect(source: str, messages: list[dict[str, Any]]) -> None:
    """What templates use beyond plain jinja2 means what it means in transformers."""
    text = render(source, messages, add_generation_prompt=False)
    assert text == expected(source, messages)


@pytest.mark.parametrize("ending", ["Well", "Well ", " Well\n", ""])
@pytest.mark.parametrize("shown", ["{{ m.content }}", "{{ m.content | trim }}"])
def test_open_end_keeps_the_spaces_that_the_template_keeps(ending: str, shown: str) -> None:
    """Also where the last message is made of parts."""
    source = "{% for m in messages %}<" + shown + ">{% endfor %}"
    parts = source.replace("m.content", "m.content[-1].text")
    turn = {"role": "assistant", "content": ending}
    listed = {"role": "assistant", "content": [{"type": "text", "text": ending}]}
    for text, message in ((source, turn), (parts, listed)):
        options = {"continue_final_message": True, "add_generation_prompt": False}
        assert render(text, [message], **options) == expected(text, [message], **options)
        assert message in (turn, listed), "the caller's message was changed"


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("{{ messages[0].content }}", PREFILL),  # leaves the last one out
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", PREFILL),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", []),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", [{"role": "assistant"}]),
    ],
)
def test_no_open_end_to_continue(source: str, messages: list[dict[str, Any]]) -> None:
    """A lost last message is a refusal, never a prompt without it."""
    with pytest.raises(TemplateRefusal, match="continue_final_message"):
        render(source, messages, add_generation_prompt=False, continue_final_message=True)


def test_two_ways_to_end_exclude_each_other() -> None:
    with pytest.raises(TemplateRefusal, match="exclude each other"):
        render("x", PREFILL, continue_final_message=True)


def test_clock_and_variables_are_arguments() -> None:
    """strftime_now formats `now`; variables come before special tokens, and some are refused."""
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y') }} {{ bos_token }} {{ mood }}", {"bos_token": "<s>"}
    )
    now = datetime(2024, 7, 26)
    assert template.render(ASK, now=now, variables={"mood": "calm"}) == "26 Jul 2024 <s> calm"
    assert template.render(ASK, now=now, variables={"bos_token": "!"}) == "26 Jul 2024 ! "
    with pytest.raises(TemplateRefusal, match="messages, tools"):
        template.render(ASK, variables={"tools": [], "messages": []})


def test_refusal_is_the_templates_own_sentence() -> None:
    with pytest.raises(TemplateRefusal, match=r"^roles must alternate$") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert not isinstance(caught.value, TemplateFailure)


def test_failure_names_the_line_and_the_error() -> None:
    with pytest.raises(TemplateFailure, match="line 3 of it: UndefinedError: 'dict object' has no"):
        render("\n\n{{ messages[0].foo.bar }}")


def test_broken_template_names_the_line() -> None:
    with pytest.raises(TemplateBroken, match=r"line 2: .*unexpected"):
        ChatTemplate("fine\n{{ 1 + }}", {})
    with pytest.raises(TemplateBroken, match=r"line 1: .*nosuchfilter"):
        ChatTemplate("{{ 1 | nosuchfilter }}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% for i in range(200) %}{{ 'x' * 100000 }}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** 9 * [0] }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ lipsum(n=100000) }}",
    ],
)
def test_runaway_templates_are_stopped(source: str) -> None:
    """Loops, recursion, products and output have bounds."""
    with pytest.raises(TemplateFailure):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ dict.__class__ }}",
        "{{ dict.mro() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% include 'other' %}",
        "{% import 'other' as other %}",
        "{% extends 'other' %}",
    ],
)
def test_sandbox_holds(source: str) -> None:
    """No way to types, modules, files or the caller's own messages."""
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TemplateFailure):
        text = render(source, messages)
        assert not text, f"got out with {text}"
        raise TemplateFailure("an empty text is no way out either")
    assert messages == ASK


def test_only_json_reaches_a_template() -> None:
    """An object's methods would be callable from within."""
    with pytest.raises(TypeError, match="JSON values, got PosixPath"):
        render("x", [{"role": "user", "content": Path("/")}])


def test_deep_nesting_is_refused() -> None:
    """Once a RecursionError from within a request."""
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TemplateRefusal, match="nested too deeply"):
        render("x", [{"role": "user", "content": deep}])


def test_templates_by_name() -> None:
    """tool_use for requests with tools, default for the others, a refusal when there is none."""
    tool_use, default = ChatTemplate("t", {}), ChatTemplate("d", {})
    both = {"tool_use": tool_use, "default": default}
    assert choose_template(both, [{}]) is tool_use
    assert choose_template(both, None) is default
    assert choose_template({"default": default}, [{}]) is default
    with pytest.raises(TemplateRefusal, match="only for \\['rag', 'tool_use'\\]"):
        choose_template({"tool_use": tool_use, "rag": default}, None)
