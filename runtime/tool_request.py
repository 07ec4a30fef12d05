"""What a request says about tools: checked, and what it means for its prompt and its answer.

Knows the fields (OpenAI's specification 2.3.0) and which dialect the model's template speaks;
knows neither how calls are read nor how answers look.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from cache import conversation
from cache.template import TemplateRefusal
from cache.tokens import NoChatTemplate, Tokenizer
from runtime.tool_forms import Tool
from runtime.tools import Dialect, dialect_of
from runtime.wire import ChatRequest, Problem, problem_of

TOOLS_MAX = 128
NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class _Given(BaseModel):
    """Fields that are not checked here belong to the chat template."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)


class _Function(_Given):
    name: Annotated[str, Field(strict=True)]
    description: Annotated[str, Field(strict=True)] | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class _Tool(_Given):
    type: Literal["function"]
    function: _Function


class _CalledFunction(_Given):
    name: Annotated[str, Field(strict=True)]
    arguments: Annotated[str, Field(strict=True)] | dict[str, Any] | None = None


class _ToolCall(_Given):
    id: Annotated[str, Field(strict=True)] | None = None
    type: Literal["function"] = "function"
    function: _CalledFunction


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that an answer may call. Those that are `wanted` are the only ones where a call is
    `forced`. With `parallel` False an answer ends behind its first call.

    `template` is the text of the model's own; `special` the ids of the dialect's marks that are
    special tokens; `past_calls` how many calls the conversation has already.
    """

    dialect: Dialect
    template: str
    special: Mapping[str, int]
    wanted: tuple[Tool, ...]
    forced: bool
    parallel: bool
    past_calls: int

    @property
    def functions(self) -> dict[str, Mapping[str, Any]]:
        """The parameters' schemas by the functions' names."""
        return {tool.name: tool.parameters or {} for tool in self.wanted}

    @property
    def strict(self) -> bool:
        return any(tool.strict for tool in self.wanted)


def tool_use(asked: ChatRequest, tokenizer: Tokenizer) -> ToolUse | None:
    """None when an answer cannot call tools: none are offered, or the template's way is not known.

    Raises Problem 400 for tools, tool_choice or past calls that are not what they should be.
    """
    for older in ("functions", "function_call"):
        if getattr(asked, older) is not None:
            why = "this older form of tools is not supported; send tools and tool_choice"
            raise _problem(older, why, "unsupported_parameter")
    tools = _check_tools(asked.tools or ())
    named = _check_choice(asked, [tool.name for tool in tools])
    past_calls = sum(
        _check_calls((message.model_extra or {}).get("tool_calls"), f"messages.{at}.tool_calls")
        for at, message in enumerate(asked.messages)
    )
    if not tools or asked.tool_choice == "none":
        return None
    try:
        template = tokenizer.template(asked.tools).literals
    except (NoChatTemplate, TemplateRefusal):
        return None  # rendering the prompt says so
    forced = asked.tool_choice == "required" or named is not None
    dialect = dialect_of(template)
    if dialect is None:
        if forced:
            raise _problem("tool_choice", NO_DIALECT, "unsupported_parameter")
        return None
    return ToolUse(
        dialect,
        template,
        tokenizer.special_tokens_of(dialect.markers),
        tuple(tool for tool in tools if named in (None, tool.name)),
        forced=forced,
        parallel=asked.parallel_tool_calls is not False and named is None,
        past_calls=past_calls,
    )


NO_DIALECT = (
    "this model's chat template shows no way of calling tools that is known here, so no call can "
    "be forced; auto and none work, and response_format gives an answer that obeys a schema"
)


def offered(asked: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the template is to show."""
    return conversation.offered(asked.tools, asked.tool_choice)


# ---- checks -------------------------------------------------------------------------------------


def _check_tools(tools: Sequence[dict[str, Any]]) -> list[Tool]:
    if len(tools) > TOOLS_MAX:
        raise _problem("tools", f"at most {TOOLS_MAX} tools are accepted, got {len(tools)}")
    checked: dict[str, Tool] = {}
    for at, given in enumerate(tools):
        where = f"tools.{at}"
        if given.get("type", "function") != "function":
            message = f"a tool of type {given['type']!r} is not supported; send function tools"
            raise _problem(f"{where}.type", message, "unsupported_parameter")
        function = _valid(_Tool, given, where).function
        if not re.fullmatch(NAME, function.name):
            message = "expected 1 to 64 of the characters a-z, A-Z, 0-9, _ and -"
            raise _problem(f"{where}.function.name", message)
        if function.name in checked:
            message = f"there is another tool with the name {function.name!r}"
            raise _problem(f"{where}.function.name", message)
        _check_parameters(function.parameters or {}, f"{where}.function.parameters")
        checked[function.name] = Tool(function.name, function.parameters, bool(function.strict))
    return list(checked.values())


def _check_parameters(schema: dict[str, Any], where: str) -> None:
    """Parameters are the JSON schema of an object; what is within it, a grammar will find out."""
    if schema.get("type", "object") != "object":
        message = f"expected the JSON schema of an object, got one of type {schema['type']!r}"
        raise _problem(f"{where}.type", message)
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise _problem(f"{where}.properties", "expected an object of JSON schemas")
    for name, one in properties.items():
        if not isinstance(one, dict | bool):
            raise _problem(f"{where}.properties.{name}", "expected a JSON schema")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
        raise _problem(f"{where}.required", "expected a list of names")


def _check_choice(asked: ChatRequest, names: Sequence[str]) -> str | None:
    """The function that tool_choice names, if it names one."""
    choice = asked.tool_choice
    if choice in (None, "auto", "none"):
        return None
    named = _named(choice)
    if choice != "required" and named is None:
        message = (
            "expected 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
        )
        raise _problem("tool_choice", message)
    if not names:
        raise _problem("tool_choice", "a tool can be asked for only where tools are given")
    if named is not None and named not in names:
        message = f"there is no tool with the name {named!r}; given: {', '.join(names)}"
        raise _problem("tool_choice.function.name", message)
    return named


def _named(choice: Any) -> str | None:
    """The function that a tool_choice names; None when it names none, or is not well-formed."""
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return None
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _check_calls(calls: Any, where: str) -> int:
    """How many calls these are."""
    if calls is None:
        return 0
    if not isinstance(calls, list):
        raise _problem(where, "expected a list of calls")
    for at, call in enumerate(calls):
        if not isinstance(call, dict):
            raise _problem(f"{where}.{at}", "expected an object")
        _valid(_ToolCall, call, f"{where}.{at}")
    return len(calls)


Checked = TypeVar("Checked", bound=BaseModel)


def _valid(model: type[Checked], given: dict[str, Any], where: str) -> Checked:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        problem = problem_of(error)
        param = f"{where}.{problem.param}" if problem.param else where
        message = problem.message.removeprefix(f"{problem.param}: ")
        raise _problem(param, message, problem.code or "invalid_value") from None


def _problem(param: str, message: str, code: str = "invalid_value") -> Problem:
    return Problem(400, f"{param}: {message}", param=param, code=code)
