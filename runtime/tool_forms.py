"""How each dialect's models are made to write calls: the texts around names and arguments.

Knows the forms as the models' own templates show them; knows no grammar and no parser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.tools import Dialect


@dataclass(frozen=True, slots=True)
class Form:
    """How calls are written: `start`, each call as `head` ARGUMENTS `tail`, `between`, `end`.

    In these texts ⟨name⟩ is the function's name, ⟨index⟩ a small number, and a newline is a little
    whitespace, or none. `single`: the template takes one call a turn.
    """

    head: str
    tail: str
    start: str = ""
    between: str = ""
    end: str = ""
    single: bool = False


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call. `strict`: its schema is obeyed in full, or refused."""

    name: str
    parameters: Mapping[str, Any] | None
    strict: bool = False


JSON_HEAD = '{"name": "⟨name⟩", "arguments": '
BAR = "｜"  # noqa: RUF001 - DeepSeek's tokens are spelled with a wide bar


def form_of(dialect: Dialect, template: str) -> Form:
    """The form that a template's own text shows, where a dialect has several."""
    match dialect.name:
        case "mistral" if "[ARGS]" in template:
            return Form("[TOOL_CALLS]⟨name⟩[ARGS]", "")
        case "phi4" if "functools[" in template:
            return Form(JSON_HEAD, "}", "functools[", ",\n", "]")
        case "deepseek" if "```json" in template:
            return _deepseek("function<SEP>⟨name⟩\n```json\n", "\n```<END>")
        case "deepseek":
            return _deepseek("⟨name⟩<SEP>", "<END>")
    return FORMS[dialect.name]


def _deepseek(head: str, tail: str) -> Form:
    marks = {"SEP": "tool▁sep", "END": "tool▁call▁end"}

    def spell(text: str) -> str:
        return re.sub(r"<(SEP|END)>", lambda found: f"<{BAR}{marks[found[1]]}{BAR}>", text)

    return Form(
        head=f"<{BAR}tool▁call▁begin{BAR}>" + spell(head),
        tail=spell(tail),
        start=f"<{BAR}tool▁calls▁begin{BAR}>",
        between="\n",
        end=f"<{BAR}tool▁calls▁end{BAR}>",
    )


FORMS = {
    "hermes": Form(f"<tool_call>\n{JSON_HEAD}", "}\n</tool_call>", between="\n"),
    "llama_json": Form('{"name": "⟨name⟩", "parameters": ', "}", single=True),
    "mistral": Form(JSON_HEAD, "}", "[TOOL_CALLS]\n[", ",\n", "]"),
    "granite": Form(JSON_HEAD, "}", "<|tool_call|>\n[", ",\n", "]"),
    "phi4": Form(JSON_HEAD, "}", "<|tool_call|>\n[", ",\n", "]\n<|/tool_call|>"),
    "kimi_k2": Form(
        "<|tool_call_begin|>functions.⟨name⟩:⟨index⟩<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_begin|>",
        "",
        "<|tool_calls_section_end|>",
    ),
    "command_r": Form(
        '{\n"tool_name": "⟨name⟩",\n"parameters": ',
        "\n}",
        "Action:\n```json\n[\n",
        ",\n",
        "\n]\n```",
    ),
    "command_r7b": Form(
        '{\n"tool_call_id": "⟨index⟩",\n"tool_name": "⟨name⟩",\n"parameters": ',
        "\n}",
        "<|START_ACTION|>[\n",
        ",\n",
        "\n]<|END_ACTION|>",
    ),
    "qwen3_coder": Form(
        "<tool_call>\n<function=⟨name⟩>\n", "</function>\n</tool_call>", between="\n"
    ),
    "glm4_moe": Form("<tool_call>⟨name⟩\n", "</tool_call>", between="\n"),
    "olmo3": Form("⟨name⟩(", ")", "<function_calls>\n", "\n", "\n</function_calls>"),
    "pythonic": Form("⟨name⟩(", ")", "[", ",\n", "]"),
}  # fmt: skip  # one table
