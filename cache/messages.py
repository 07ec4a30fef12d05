"""A conversation's JSON on its way to a chat template, and the mark that leaves its end open.

Knows neither templates nor tokenizers: pure functions over messages, tools and variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")  # the first one present speaks for all
CONTINUE_MARK = "<CONTINUE HERE> "  # its last space shows whether the template strips the end


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value, made of plain types only, with every string (keys too) changed.

    Raises TypeError for anything else: an object's methods would be within a template's reach.
    """
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return change(str.__str__(value))
    if isinstance(value, Mapping):
        return {map_texts(key, change): map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if isinstance(value, tuple):
        return tuple(map_texts(item, change) for item in value)
    raise TypeError(f"a chat template takes JSON values, got {type(value).__name__}")


def plain(value: Any) -> Any:
    """A copy of a JSON value, made of plain types only. Raises TypeError for anything else."""
    return map_texts(value, lambda text: text)


def share_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Clients and templates disagree on the name of the reasoning text."""
    thoughts = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if thoughts is None:
        return message
    return {"thinking": thoughts, **message, "reasoning_content": thoughts}


def mark_end(turns: list[dict[str, Any]]) -> str | None:
    """Marks the end of the last message's content (of parts: the last text), and returns it.

    None when there is no text to go on with.
    """
    content = turns[-1].get("content") if turns else None
    if isinstance(content, str):
        turns[-1]["content"] = content + CONTINUE_MARK
        return content
    for part in reversed(content or ()):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            ending: str = part["text"]
            part["text"] = ending + CONTINUE_MARK
            return ending
    return None


def cut_at_mark(rendered: str, ending: str) -> str | None:
    """The rendered text up to the mark behind `ending`; None when the template changed that."""
    at = rendered.rfind(CONTINUE_MARK.rstrip())
    if at < 0 or ending.strip() not in rendered:
        return None
    kept = rendered[:at]
    return kept if rendered.startswith(CONTINUE_MARK, at) else kept.rstrip()
