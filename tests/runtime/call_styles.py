"""How each dialect's models write calls, from their templates; knows nothing of the parsers."""

# ruff: noqa: RUF001 - DeepSeek's tokens are spelled with a wide bar

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


def text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def hermes(calls: list[Call]) -> str:
    return "\n".join(f"<tool_call>\n{named(one)}\n</tool_call>" for one in calls)


def named(one: Call) -> str:
    return f'{{"name": {text(one.name)}, "arguments": {text(one.arguments)}}}'


def pocket(calls: list[Call]) -> str:
    return "".join(f"<tool_call>{named(one)}</tool_call>" for one in calls)


def arguments_first(calls: list[Call]) -> str:
    return "\n".join(
        f"<tool_call>{text({'id': 7, 'arguments': one.arguments, 'name': one.name})}</tool_call>"
        for one in calls
    )


def arguments_as_text(calls: list[Call]) -> str:
    return "\n".join(
        f"<tool_call>{text({'name': one.name, 'arguments': text(one.arguments)})}</tool_call>"
        for one in calls
    )


def llama(calls: list[Call]) -> str:
    return "; ".join(
        f'{{"name": {text(one.name)}, "parameters": {text(one.arguments)}}}' for one in calls
    )


def objects(calls: list[Call], **more: Any) -> str:
    return text([{"name": one.name, "arguments": one.arguments} | more for one in calls])


def mistral_args(calls: list[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{one.name}[ARGS]{text(one.arguments)}" for one in calls)


def mistral_ids(calls: list[Call]) -> str:
    return "".join(
        f"[TOOL_CALLS]{one.name}[CALL_ID]a1b2c3d4e[ARGS]{text(one.arguments)}" for one in calls
    )


def deepseek_v3(calls: list[Call]) -> str:
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{one.name}\n```json\n{text(one.arguments)}\n```"
        "<｜tool▁call▁end｜>"
        for one in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: list[Call]) -> str:
    inner = "".join(
        f"<｜tool▁call▁begin｜>{one.name}<｜tool▁sep｜>{text(one.arguments)}<｜tool▁call▁end｜>"
        for one in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def kimi(calls: list[Call]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{one.name}:{at}<|tool_call_argument_begin|>"
        f"{text(one.arguments)}<|tool_call_end|>"
        for at, one in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def command_r(calls: list[Call]) -> str:
    listed = [{"tool_name": one.name, "parameters": one.arguments} for one in calls]
    return f"Action:\n```json\n{json.dumps(listed, indent=4, ensure_ascii=False)}\n```"


def command_r7b(calls: list[Call]) -> str:
    listed = [
        {"tool_call_id": str(at), "tool_name": one.name, "parameters": one.arguments}
        for at, one in enumerate(calls)
    ]
    return f"<|START_ACTION|>{json.dumps(listed, indent=4, ensure_ascii=False)}<|END_ACTION|>"


def tagged(value: Any) -> str:
    return value if isinstance(value, str) else text(value)


def qwen_coder(calls: list[Call]) -> str:
    def write(one: Call) -> str:
        inner = "".join(
            f"<parameter={key}>\n{tagged(value)}\n</parameter>\n"
            for key, value in one.arguments.items()
        )
        return f"<tool_call>\n<function={one.name}>\n{inner}</function>\n</tool_call>"

    return "\n".join(map(write, calls))


def qwen_coder_bare(calls: list[Call]) -> str:
    """Some of its models leave the outer tag away."""
    return qwen_coder(calls).replace("<tool_call>\n", "").replace("\n</tool_call>", "")


def glm(calls: list[Call]) -> str:
    def write(one: Call) -> str:
        inner = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{tagged(value)}</arg_value>\n"
            for key, value in one.arguments.items()
        )
        return f"<tool_call>{one.name}\n{inner}</tool_call>"

    return "\n".join(map(write, calls))


def python(value: Any) -> str:
    """A literal as Python writes it, the text in either kind of quotes."""
    return repr(value)


def pythonic(calls: list[Call]) -> str:
    return f"[{', '.join(map(as_python, calls))}]"


def olmo(calls: list[Call]) -> str:
    return f"<function_calls>\n{chr(10).join(map(as_python, calls))}\n</function_calls>"


def as_python(one: Call) -> str:
    return f"{one.name}({', '.join(f'{key}={python(v)}' for key, v in one.arguments.items())})"


# style: (the dialect's name, how it writes calls)
STYLES: dict[str, tuple[str, Callable[[list[Call]], str]]] = {
    "hermes": ("hermes", hermes),
    "pocket": ("hermes", pocket),
    "arguments first": ("hermes", arguments_first),
    "arguments as text": ("hermes", arguments_as_text),
    "llama": ("llama_json", llama),
    "llama python_tag": ("llama_json", lambda calls: "<|python_tag|>" + llama(calls)),
    "llama 4 json": (
        "llama_json",
        lambda calls: f"<|python_start|>{llama(calls)}<|python_end|>",
    ),
    "mistral": ("mistral", lambda calls: "[TOOL_CALLS] " + objects(calls, id="a1b2c3d4e")),
    "mistral without ids": ("mistral", lambda calls: "[TOOL_CALLS]" + objects(calls)),
    "mistral args": ("mistral", mistral_args),
    "mistral ids": ("mistral", mistral_ids),
    "granite": ("granite", lambda calls: "<|tool_call|>" + objects(calls)),
    "granite text": ("granite", lambda calls: "<tool_call>" + objects(calls)),
    "phi": ("phi4", lambda calls: "functools" + objects(calls)),
    "phi tokens": ("phi4", lambda calls: f"<|tool_call|>{objects(calls)}<|/tool_call|>"),
    "deepseek v3": ("deepseek", deepseek_v3),
    "deepseek v3.1": ("deepseek", deepseek_v31),
    "kimi": ("kimi_k2", kimi),
    "command r": ("command_r", command_r),
    "command r7b": ("command_r7b", command_r7b),
    "qwen coder": ("qwen3_coder", qwen_coder),
    "qwen coder bare": ("qwen3_coder", qwen_coder_bare),
    "glm": ("glm4_moe", glm),
    "pythonic": ("pythonic", pythonic),
    "llama 4 pythonic": (
        "pythonic",
        lambda calls: f"<|python_start|>{pythonic(calls)}<|python_end|>",
    ),
    "olmo": ("olmo3", olmo),
}

# What makes calls hard to read: quotes, braces, escapes, the dialects' own marks, wide characters.
CHARACTERS = st.sampled_from("aZ0 _-\"'\\{}[](),:;=<>/|`\n\t\u00e9\u4e16\U0001f642\x07")
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=12),
    st.sampled_from(['{"name": "', "</tool_call", "]", "[ARGS]", "```", "<|python_end|", "a\\"]),
)
VALUES = st.recursive(
    st.one_of(
        TEXTS,
        st.integers(-(2**60), 2**60),
        st.booleans(),
        st.none(),
        st.floats(allow_nan=False, allow_infinity=False, width=32),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
NAMES = st.sampled_from(["f", "get_weather", "read-file", "Order2"])
KEYS = st.sampled_from(["a", "city", "x_1", "name", "arguments"])
CALLS = st.lists(
    st.builds(Call, NAMES, st.dictionaries(KEYS, VALUES, max_size=3)), min_size=1, max_size=3
)
