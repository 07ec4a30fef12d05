"""Tool calls in what a model writes: which dialect it speaks, and reading them as they come.

Knows the dialects by the marks in the models' own chat templates; knows neither requests nor
answers. How each group of dialects is read is in tool_json.py, tool_xml.py and tool_python.py.
"""

# ruff: noqa: RUF001 - DeepSeek's tokens are spelled with a wide bar
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from cache.conversation import DEEPSEEK_MARKS, PHI_MARKS, Marks, has_marks
from runtime.tool_json import JsonCalls, NamedCalls
from runtime.tool_python import PythonCalls
from runtime.tool_reader import (
    Arguments,
    Event,
    Malformed,
    Reader,
    Steps,
    Text,
    Unfinished,
    safe_chars,
)
from runtime.tool_xml import TaggedCalls, argument_types

Calls = JsonCalls | NamedCalls | TaggedCalls | PythonCalls


@dataclass(frozen=True)
class Dialect:
    """How a family of models writes calls.

    A template with all the texts of one of `marks` speaks it. `openers` begin calls; `bare` is the
    character with which an answer begins a call without an opener. `known_only`: a name that the
    request does not offer makes no call, because text could look like one. `id_form` is what a
    call's id looks like: its `name`, its `number` in the conversation, and `id_chars` `random`
    characters.
    """

    name: str
    marks: Marks
    openers: tuple[str, ...]
    calls: Calls
    bare: str = ""
    known_only: bool = False
    id_form: str = "call_{random}"
    id_chars: int = 24

    def speaks(self, template: str) -> bool:
        return has_marks(template, self.marks)

    @cached_property
    def markers(self) -> frozenset[str]:
        """Every marker that may be a special token, which answers do not show otherwise."""
        return frozenset((*self.openers, *self.calls.markers)) - {""}

    @cached_property
    def opener(self) -> re.Pattern[str]:
        """Matches an opening marker; of one that is a part of its call, the place before it."""
        lead = self.calls.name_open if isinstance(self.calls, TaggedCalls) else ""
        patterns = [
            f"(?={re.escape(one)})" if one == lead else re.escape(one) for one in self.openers
        ]
        return re.compile("|".join(patterns) or "(?!)")


HERMES = Dialect(
    "hermes",
    marks=(("<tool_call>",),),
    openers=("<tool_call>",),
    calls=JsonCalls(closers=("</tool_call>",)),
)
LLAMA = Dialect(
    "llama_json",
    marks=(("<|python_tag|>",), ('"parameters": dictionary of argument name',)),
    openers=("<|python_tag|>", "<|python_start|>"),
    calls=JsonCalls(closers=("<|python_end|>",), separator=";", unmarked=True),
    bare="{",
    known_only=True,
)
MISTRAL = Dialect(
    "mistral",
    marks=(("[TOOL_CALLS]",),),
    openers=("[TOOL_CALLS]",),
    calls=NamedCalls(
        header=re.compile(r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?"),
        again=("[TOOL_CALLS]",),
        inner=("[ARGS]", "[CALL_ID]"),
        listed=JsonCalls(),
    ),
    id_form="{random}",
    id_chars=9,
)
GRANITE = Dialect(
    "granite",
    marks=(("<|tool_call|>",),),
    openers=("<|tool_call|>", "<tool_call>"),
    calls=JsonCalls(closers=("<|/tool_call|>", "</tool_call>")),
)
PHI = Dialect(
    "phi4",
    marks=PHI_MARKS,
    openers=("<|tool_call|>", "functools"),
    calls=JsonCalls(closers=("<|/tool_call|>",)),
)
DEEPSEEK = Dialect(
    "deepseek",
    marks=DEEPSEEK_MARKS,
    openers=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    calls=NamedCalls(
        header=re.compile(
            r"\s*(?:function<｜tool▁sep｜>)?(?P<name>[^\s<{]+)"
            r"(?:<｜tool▁sep｜>|\s*```json)\s*"
        ),
        again=("<｜tool▁call▁begin｜>",),
        inner=("<｜tool▁sep｜>",),
        closers=("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    ),
)
KIMI = Dialect(
    "kimi_k2",
    marks=(("<|tool_calls_section_begin|>",),),
    openers=("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
    calls=NamedCalls(
        header=re.compile(
            r"\s*(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*"
        ),
        again=("<|tool_call_begin|>",),
        inner=("<|tool_call_argument_begin|>",),
        closers=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
    ),
    id_form="functions.{name}:{number}",
)
COMMAND = Dialect(
    "command_r",
    marks=(("Action:", "```json", '"tool_name"'),),
    openers=("Action:",),
    calls=JsonCalls(closers=("```",), fence="```json", name_keys=frozenset({"tool_name"})),
    known_only=True,
)
COMMAND_7B = Dialect(
    "command_r7b",
    marks=(("<|START_ACTION|>",),),
    openers=("<|START_ACTION|>",),
    calls=JsonCalls(closers=("<|END_ACTION|>",), name_keys=frozenset({"tool_name"})),
)
QWEN_CODER = Dialect(
    "qwen3_coder",
    marks=(("<function=", "<parameter="),),
    openers=("<tool_call>", "<function="),
    calls=TaggedCalls(
        name_open="<function=",
        name_ends=">",
        key_open="<parameter=",
        key_end=">",
        value_open="",
        value_end="</parameter>",
        call_end="</function>",
        closers=("</tool_call>",),
        framed=True,
    ),
)
GLM = Dialect(
    "glm4_moe",
    marks=(("<arg_key>", "<arg_value>"),),
    openers=("<tool_call>",),
    calls=TaggedCalls(
        name_open="",
        name_ends="\n<",
        key_open="<arg_key>",
        key_end="</arg_key>",
        value_open="<arg_value>",
        value_end="</arg_value>",
        call_end="</tool_call>",
    ),
    known_only=True,
)
OLMO = Dialect(
    "olmo3",
    marks=(("<function_calls>",),),
    openers=("<function_calls>",),
    calls=PythonCalls(listed=False, closers=("</function_calls>",)),
)
PYTHONIC = Dialect(
    "pythonic",
    marks=(("[func_name1(",),),
    openers=("<|python_start|>",),
    calls=PythonCalls(closers=("<|python_end|>",)),
    bare="[",
    known_only=True,
)
# The first that a template speaks is its dialect: the more special marks come first.
DIALECTS = (
    DEEPSEEK, KIMI, MISTRAL, COMMAND_7B, COMMAND, QWEN_CODER, GLM, OLMO, PHI, GRANITE, HERMES,
    PYTHONIC, LLAMA,
)  # fmt: skip  # one short list


@lru_cache(maxsize=16)
def dialect_of(template: str) -> Dialect | None:
    """The dialect that a chat template's own text speaks; None for one that is not known."""
    return next((dialect for dialect in DIALECTS if dialect.speaks(template)), None)


class ToolParser:
    """One answer's text, as it comes, into content and calls.

    `functions` are the request's tools by name: their parameters' JSON schemas. Everything that is
    no call comes out as Text, exactly as it was generated, save whitespace alone around calls. A
    call is certain with its name and the beginning of its arguments (in Python's dialects: with its
    end); from there on its arguments are what the model wrote, valid or not.
    """

    def __init__(self, dialect: Dialect, functions: Mapping[str, Mapping[str, Any]]) -> None:
        self._dialect = dialect
        self._functions = functions
        self._reader = Reader()
        self._steps = self._read()

    def push(self, text: str) -> list[Event]:
        """What this much more text makes certain."""
        self._reader.rest += text
        return self._go_on()

    def finish(self) -> list[Event]:
        """The answer is over: what was held back."""
        self._reader.over = True
        return self._go_on()

    def _go_on(self) -> list[Event]:
        events: list[Event] = []
        for event in self._steps:
            if event is None:
                break
            if not isinstance(event, Text | Arguments) or event.text:
                events.append(event)
        return events

    def _read(self) -> Steps[None]:
        """Text up to an opening marker, then its calls, and again."""
        reader = self._reader
        called, blank = False, True  # blank: nothing but whitespace since the start or a call
        while True:
            found = self._find(may_be_bare=blank and not called)
            if found is None:
                if reader.over:
                    break
                shown = safe_chars(reader.rest, self._dialect.openers)
                if reader.rest[:shown].strip() or not blank:
                    blank = False
                    yield Text(reader.use(shown))
                yield None
                continue
            start, end = found
            if reader.rest[:start].strip() or not blank:
                blank = False
                yield Text(reader.use(start))
                start, end = 0, end - start
            try:
                yield from self._calls(end)
            except Malformed:
                blank = False
                yield Text(reader.use(max(end, start + 1)))
            except Unfinished:
                blank = False
                break
            else:
                called = blank = True
        if not (called and blank and reader.rest.isspace()):
            yield Text(reader.use(len(reader.rest)))

    def _find(self, *, may_be_bare: bool) -> tuple[int, int] | None:
        """Where the next opening marker begins and ends."""
        text = self._reader.rest
        if may_be_bare and self._dialect.bare:
            at = len(text) - len(text.lstrip())
            if text.startswith(self._dialect.bare, at):
                return at, at
        found = self._dialect.opener.search(text)
        return found.span() if found else None

    def _calls(self, at: int) -> Steps[None]:
        calls = self._dialect.calls
        if isinstance(calls, TaggedCalls):
            return calls.read(self._reader, at, self._known, self._types)
        return calls.read(self._reader, at, self._known)

    def _known(self, name: str) -> bool:
        return name in self._functions or not self._dialect.known_only

    def _types(self, function: str, argument: str) -> frozenset[str]:
        return argument_types(self._functions.get(function, {}), argument)
