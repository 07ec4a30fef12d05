"""What a request's answer may be: which tools it may call, and the grammar that it has to follow.

Knows forms, tools and grammars as requests ask for them; knows no prompts and no sampling.
"""

from __future__ import annotations

import json

from cache.tokens import Tokenizer
from runtime.grammar import CompiledGrammar, Grammars
from runtime.lark import GrammarRefused, GrammarSpec, json_rule
from runtime.tool_grammar import ANY_TEXT, CannotForce, call_grammar
from runtime.tool_request import ToolUse, tool_use
from runtime.wire import ChatRequest, CompletionRequest, Problem

Asked = ChatRequest | CompletionRequest


def grammar_spec(asked: Asked, use: ToolUse | None) -> GrammarSpec | None:
    """The grammar that an answer has to follow: that of its form, or of calls of tools, or both.

    Raises Problem 400 where the model's way of calling tools cannot be held to what is asked.
    """
    form = asked.form
    if use is None or not (use.forced or use.strict or form):
        return None if form is None else GrammarSpec(form.kind, form.text, form.lenient, form.param)
    param = "tool_choice" if use.forced else "tools"
    if asked.ignore_eos:
        message = f"ignore_eos contradicts {param}: an answer that calls tools has an end"
        raise Problem(400, message, param="ignore_eos", code="invalid_value")
    instead = None if use.forced else ANY_TEXT
    if form is not None and not use.forced:
        instead = json_rule(json.loads(form.text), lenient=form.lenient)
    try:
        text = call_grammar(
            use.dialect,
            use.template,
            use.wanted,
            use.special,
            parallel=use.parallel,
            instead=instead,
        )
    except CannotForce as error:
        message = f"tools: {error}; without strict: true it would be left out"
        raise Problem(400, message, param="tools", code="unsupported_grammar") from None
    return GrammarSpec("grammar", text, param="tools")


def tools_of(asked: Asked, tokenizer: Tokenizer) -> ToolUse | None:
    """The tools that the answer may call. Raises Problem 400, see `tool_use`.

    A form that is not JSON leaves no room for calls, so it excludes a forced one.
    """
    if not isinstance(asked, ChatRequest):
        return None
    use = tool_use(asked, tokenizer)
    form = asked.form
    if use is None or form is None or form.kind == "json_schema":
        return use
    if use.forced:
        message = f"tool_choice and {form.param} exclude each other: an answer has one form"
        raise Problem(400, message, param="tool_choice", code="invalid_value")
    return None


def compile_grammar(spec: GrammarSpec, grammars: Grammars) -> CompiledGrammar:
    """May take a second, see `Grammars.compile`. Raises Problem 400."""
    try:
        return grammars.compile(spec)
    except GrammarRefused as error:
        raise Problem(
            400,
            f"{spec.param}: {error}",
            param=spec.param,
            code="unsupported_grammar",
        ) from error
