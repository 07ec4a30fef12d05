"""What is wrong with a policy, and where; pydantic's complaints in plain words.

Knows the schema's models by reflection only; knows nothing of YAML.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Path = tuple[str | int, ...]
_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a file; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `file` is a file's name, or an environment variable's."""

    file: str
    message: str
    place: Place | None = None
    path: str = ""
    suggestion: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.place.line}:{self.place.column}" if self.place else self.file
        what = self.message
        if self.suggestion is not None:
            what += f"; did you mean {self.suggestion!r}?"
        return "  ".join(part for part in (where, self.path, what) if part)


class PolicyError(Exception):
    """A policy that cannot be used; its text is one line a problem."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


@dataclass(frozen=True, slots=True)
class Places:
    """Where keys and values stand; a path such as `[0]` has no key, only a value."""

    keys: Mapping[Path, Place]
    values: Mapping[Path, Place]

    def of(self, path: Path, *, key: bool = False) -> Place | None:
        """The place of the path, or of the nearest ancestor that stands in the file."""
        for length in range(len(path), -1, -1):
            first, second = (self.keys, self.values) if key else (self.values, self.keys)
            place = first.get(path[:length]) or second.get(path[:length])
            if place:
                return place
        return None


# ---- paths and fields ---------------------------------------------------------------------------


def dotted(path: Sequence[str | int]) -> str:
    """`("upstreams", 0, "url")` as `upstreams[0].url`; unprintable keys are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if part.isprintable() and part else repr(part))
    return text


def model_inside(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation such as `tuple[Upstream, ...]` or `Runtime | None` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = (model_inside(argument) for argument in typing.get_args(annotation))
    return next((model for model in models if model), None)


def every_field(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each field, those of inner models too: `gateway.port`, `upstreams[].url`."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        inner = model_inside(field.annotation)
        if inner:
            origin = typing.get_origin(field.annotation)
            many = "[]" if origin in (tuple, list) else ".*" if origin is dict else ""
            yield from every_field(inner, f"{prefix}{name}{many}.")


def _walk(model: type[BaseModel], path: Path) -> tuple[type[BaseModel] | None, FieldInfo | None]:
    """The model and the field that a path ends in, as far as the schema knows them."""
    here: type[BaseModel] | None = model
    field: FieldInfo | None = None
    own_key = False  # the next part is a name that the user gave
    for part in path:
        if isinstance(part, int) or own_key:
            own_key = False
            continue
        field = here.model_fields.get(part) if here else None
        here = model_inside(field.annotation) if field else None
        own_key = field is not None and typing.get_origin(field.annotation) is dict
    return here, field


# ---- suggestions --------------------------------------------------------------------------------


_MEANT = {"gpu": "cuda", "nvidia": "cuda", "float32": "fp32", "bfloat16": "bf16"}


def closest(word: str, choices: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The choice that a person most likely meant, or None."""
    plain = word.lower().replace("-", "_")
    if _MEANT.get(plain) in choices:
        return _MEANT[plain]
    by_plain = {choice.lower().replace("-", "_"): choice for choice in choices}
    found = difflib.get_close_matches(plain, by_plain, n=1, cutoff=cutoff)
    return by_plain[found[0]] if found else None


def _suggest_key(root: type[BaseModel], path: Path) -> str | None:
    """A field of the same model, or the place elsewhere where this key belongs."""
    key = str(path[-1])[:_SHOWN_CHARS]
    owner, _ = _walk(root, path[:-1])
    everywhere = {name: name.rpartition(".")[2] for name, _ in every_field(root)}
    for name, last in everywhere.items():
        if last == key:
            return name
    near = closest(key, list(owner.model_fields)) if owner else None
    if near:
        return near
    far = closest(key, list(everywhere.values()), cutoff=0.75)
    return next((name for name, last in everywhere.items() if last == far), None)


# ---- pydantic's complaints ----------------------------------------------------------------------


def describe(value: object) -> str:
    """A value as a reader of YAML names it: `the text '80'`, `the integer 80`, `nothing (null)`."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
        case int():
            return f"the integer {value}"
        case float():
            return f"the number {value}"
        case str():
            short = value if len(value) <= _SHOWN_CHARS else value[: _SHOWN_CHARS - 1] + "…"
            return f"the text {short!r}"
        case list():
            return "a list"
        case _:
            return "a mapping"


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "string_unicode": "text of valid Unicode",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
    "string_too_short": "at least {min_length} character(s)",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
}


def _number(limit: float) -> str:
    return str(int(limit)) if float(limit).is_integer() else str(limit)


def _expected(kind: str, context: Mapping[str, Any]) -> str | None:
    template = _EXPECTED.get(kind)
    if template is None:
        return None
    for name in ("ge", "gt", "le", "lt"):
        if name in context:
            return template.replace(f"{{{name}:g}}", _number(context[name]))
    return template.format(**context)


def explain(
    error: ValidationError, root: type[BaseModel], file: str, places: Places
) -> list[Problem]:
    """Each complaint of pydantic as a Problem that points into the file."""
    complaints = error.errors(include_url=False)
    wrong = [complaint["loc"] for complaint in complaints]
    return [
        _explain_one(complaint, root, file, places)
        for complaint in complaints
        if not (complaint["type"] == "too_short" and _inside(complaint["loc"], wrong))
    ]


def _inside(path: Path, wrong: Sequence[Path]) -> bool:
    """Whether something in it is wrong: pydantic then also counts it as missing from its list."""
    return any(len(one) > len(path) and one[: len(path)] == path for one in wrong)


def _explain_one(complaint: Any, root: type[BaseModel], file: str, places: Places) -> Problem:
    path: Path = complaint["loc"]
    kind: str = complaint["type"]
    value = complaint["input"]
    context = complaint.get("ctx", {})
    model, field = _walk(root, path)
    suggestion = None
    at_key = False
    if kind == "extra_forbidden":
        at_key = True
        suggestion = _suggest_key(root, path)
        message = "unknown field"
        if path[-1] == "<<":
            message = "merge keys (<<) are not YAML 1.2: write the fields out"
    elif kind == "missing":
        message = f"missing: {field.description}" if field else "missing"
        at_key = True
    elif kind == "value_error":
        message = str(context["error"])
    elif kind == "too_long":
        message = (
            f"expected at most {context['max_length']} entries, got {context['actual_length']}"
        )
    elif kind == "too_short":
        message = (
            f"expected at least {context['min_length']} entries, got {context['actual_length']}"
        )
    elif kind == "model_type":
        names = ", ".join(model.model_fields) if model else ""
        message = f"expected a mapping with {names}; got {describe(value)}"
        if value is None:
            message += "; leave the key out for the defaults"
    else:
        expected = "a finite number" if value != value else _expected(kind, context)
        message = f"expected {expected}, got {describe(value)}" if expected else complaint["msg"]
        message += _advice(kind, value, field)
        if kind == "literal_error" and isinstance(value, str) and field:
            choices = [choice for choice in _choices(field.annotation) if isinstance(choice, str)]
            suggestion = closest(value[:_SHOWN_CHARS], choices)
    return Problem(file, message, places.of(path, key=at_key), dotted(path), suggestion)


def _advice(kind: str, value: object, field: FieldInfo | None) -> str:
    if value is None and field is not None and not field.is_required():
        return "; leave the key out for the default"
    short = isinstance(value, str) and len(value) <= _SHOWN_CHARS
    numeric = short and str(value).replace(".", "", 1).isdecimal()
    if kind in ("int_type", "float_type") and numeric:
        return "; write it without quotes"
    return ""


def _choices(annotation: Any) -> list[object]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for inner in typing.get_args(annotation) for choice in _choices(inner)]
