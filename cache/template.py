"""Chat templates: messages -> the text that a model was trained on.

Knows what a template is given and what of its text counts; sandbox.py runs it. The results are
those of transformers 5.23, `render_jinja_template`; a test renders 71 public templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from cache.messages import cut_at_mark, mark_end, plain, share_reasoning
from cache.sandbox import (
    Program,
    TemplateBroken,
    TemplateFailure,
    TemplateProblem,
    TemplateRefusal,
)

__all__ = [
    "ChatTemplate",
    "TemplateBroken",
    "TemplateFailure",
    "TemplateProblem",
    "TemplateRefusal",
    "choose_template",
]

Message = Mapping[str, Any]

RESERVED = {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"}


class ChatTemplate:
    """One chat template, compiled once; render it from any thread. See Program for its bounds."""

    __slots__ = ("_program", "reads_argument_text", "special_tokens")

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are names that the template may use: bos_token, eos_token, ...

        Raises TemplateBroken with the line when the source does not compile.
        """
        self._program = Program(source)
        self.special_tokens = dict(special_tokens)
        # Such a template takes a past call's arguments as text too, and writes them as they are.
        self.reads_argument_text = bool(re.search(r"arguments\s+is\s+string", source))

    @property
    def literals(self) -> str:
        """All text that the template itself contains, its pieces apart by NUL."""
        return self._program.literals

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The prompt as text.

        `continue_final_message` leaves the last message open, for the model to go on with.
        `variables` are further names for the template (`enable_thinking`, `documents`, ...), and
        come before the special tokens; `now` is what `strftime_now` formats, else the clock.

        Raises TemplateRefusal, TypeError for values that are not JSON.
        """
        taken = sorted(RESERVED & set(variables or ()))
        if taken:
            raise TemplateRefusal(f"not free for a template variable: {', '.join(taken)}")
        if continue_final_message and add_generation_prompt:
            raise TemplateRefusal(
                "continue_final_message and add_generation_prompt exclude each other: "
                "one goes on with the last message, the other begins a new one"
            )
        try:
            turns = [share_reasoning(plain(dict(message))) for message in messages]
            names = {
                "documents": None,
                **self.special_tokens,
                **plain(dict(variables or {})),
                "tools": plain(tools),
                "add_generation_prompt": add_generation_prompt,
                "strftime_now": (now or datetime.now()).strftime,
            }
        except RecursionError:
            raise TemplateRefusal("the messages or tools are nested too deeply") from None
        if continue_final_message:
            return self._continue(names, turns)
        return self._program.run(names | {"messages": turns})

    def _continue(self, names: Mapping[str, Any], turns: list[dict[str, Any]]) -> str:
        ending = mark_end(turns)
        if ending is None:
            raise TemplateRefusal(
                "continue_final_message needs a last message with text as its content"
            )
        text = cut_at_mark(self._program.run({**names, "messages": turns}), ending)
        if text is None:
            raise TemplateRefusal(
                "continue_final_message: the template leaves the last message out or changes it"
            )
        return text


def choose_template(
    templates: Mapping[str, ChatTemplate], tools: Sequence[Mapping[str, Any]] | None
) -> ChatTemplate:
    """A folder may name several: `tool_use` is for requests with tools, `default` for the rest.

    Raises TemplateRefusal when there is none for this request.
    """
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    raise TemplateRefusal(
        f"the model has chat templates only for {sorted(templates)}, and none that is the default"
    )
