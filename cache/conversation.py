"""A chat request's fields -> the conversation that a template renders, and its token ids.

One definition for the runtime, which computes a prompt, and the gateway, which only hashes it.
Takes plain JSON values; imports neither templates nor tokenizers before it is asked for ids.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache.tokens import Tokenizer

Turn = dict[str, Any]

# Groups of texts by which templates are known: each of them by one group, all of which it has.
Marks = tuple[tuple[str, ...], ...]
DEEPSEEK_MARKS: Marks = (("<｜tool▁calls▁begin｜>",),)  # noqa: RUF001  # spelled with a wide bar
PHI_MARKS: Marks = (("functools[",), ("<|tool|>", "<|/tool|>"))
_TEXT_PARTS = ("text", "refusal")


class UnreadableContent(ValueError):
    """A message's part that is no text; `at` is its place in the message."""

    def __init__(self, at: int, kind: object) -> None:
        super().__init__(f"a part of type {kind!r} is not text")
        self.at = at
        self.kind = kind


def joined_text(content: Any) -> str | None:
    """Content as one string, its parts joined. Raises UnreadableContent."""
    if content is None or isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type")
        if kind not in _TEXT_PARTS or not isinstance(part.get(kind), str):
            raise UnreadableContent(at, kind)
        texts.append(part[kind])
    return "".join(texts)


def turn_of(message: Mapping[str, Any]) -> Turn:
    """A message as templates take it: role and content first, nothing that is null, text as one
    string. Raises UnreadableContent."""
    turn: Turn = {"role": message["role"]}
    content = message.get("content")
    if content is not None:
        turn["content"] = joined_text(content)
    for name, value in message.items():
        if value is not None and name not in turn:
            turn[name] = value
    if content is None and ("content" in message or turn.get("tool_calls")):
        turn["content"] = ""  # templates join it to the calls
    if not turn.get("tool_calls", True):
        del turn["tool_calls"]  # templates ask only whether it is there
    return turn


def offered(tools: Sequence[dict[str, Any]] | None, choice: Any) -> list[dict[str, Any]] | None:
    """The tools that the template is to show; `strict` is for us, and no model has seen it."""
    if not tools or choice == "none":
        return None
    return [_without_strict(tool) for tool in tools]


def _without_strict(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict) or "strict" not in function:
        return tool
    return tool | {"function": {key: one for key, one in function.items() if key != "strict"}}


def chat_ids(
    tokenizer: Tokenizer,
    turns: list[Turn],
    *,
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Mapping[str, Any] | None,
    limit_tokens: int | None = None,
    encode: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """Token ids of a conversation. `encode` as in `Tokenizer.encode_chat`, which says what this
    raises."""
    from cache.template import TemplateFailure

    def ids(form: list[Turn]) -> list[int]:
        return tokenizer.encode_chat(
            form,
            tools=tools,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            variables=variables,
            limit_tokens=limit_tokens,
            encode=encode,
        )

    template = tokenizer.template(tools)
    wants_text = template.reads_argument_text or takes_text(template.literals)
    forms = argument_forms(turns, text_first=wants_text)
    for form in forms[:-1]:
        with contextlib.suppress(TemplateFailure):  # it may take past calls in the other form
            return ids(form)
    return ids(forms[-1])


# ---- past calls ---------------------------------------------------------------------------------


def has_marks(template: str, marks: Marks) -> bool:
    """Whether a template of this text is known by one of the groups."""
    return any(all(mark in template for mark in group) for group in marks)


def takes_text(template: str) -> bool:
    """Whether a template of this text wants a past call's arguments as text, not as an object."""
    return has_marks(template, DEEPSEEK_MARKS) or has_marks(template, PHI_MARKS)


def argument_forms(turns: list[Turn], *, text_first: bool) -> list[list[Turn]]:
    """The conversation with its past calls' arguments as the template takes them, the likelier form
    first; just the conversation when no call is in it.

    Clients send the text that the model wrote. Most templates want an object, as transformers
    documents; some only text; those that read text write it as it is, to the character.
    """
    if not any(turn.get("tool_calls") for turn in turns):
        return [turns]
    objects = [_with_arguments(turn, _as_object) for turn in turns]
    texts = [_with_arguments(turn, _as_text) for turn in turns]
    return [texts, objects] if text_first else [objects, texts]


def _with_arguments(turn: Turn, form: Callable[[Any], Any]) -> Turn:
    if not turn.get("tool_calls"):
        return turn
    calls = [
        call | {"function": call["function"] | {"arguments": form(call["function"]["arguments"])}}
        if "arguments" in call["function"]
        else call
        for call in turn["tool_calls"]
    ]
    return turn | {"tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    """An object where the text is one; the model may have written something else."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> Any:
    if not isinstance(arguments, dict):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)
