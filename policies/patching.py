"""The two configurations that a hypothesis compares: a policy file each, with its patch applied.

Knows paths such as `runtime.kv` and what of two policies differs; what may differ, `knobs` says.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from policies.hypothesis import Hypothesis, Variant, misfit
from policies.load import read_yaml
from policies.problems import Places, PolicyError, Problem, closest, explain
from policies.schema import Deployment


@dataclass(frozen=True, slots=True)
class Configured:
    """A variant that we start: its policy file, what the file says with the patch, and the same
    as a policy."""

    file: Path
    data: Mapping[str, Any]
    deployment: Deployment


def variants(file: str | Path, hypothesis: Hypothesis) -> tuple[Configured | None, ...]:
    """Baseline and candidate; None for one that runs already, at a URL.

    Raises PolicyError: for a policy file at its place, for a patch at its place in the hypothesis,
    for a candidate's file that differs from the baseline's in what is no knob of such a change.
    """
    base, other = hypothesis.baseline, hypothesis.candidate
    if other.url is None and other.config is None:
        other = other.model_copy(update={"config": base.config})
    first, second = _configured(file, "baseline", base), _configured(file, "candidate", other)
    if first is not None and second is not None:
        _, places, _ = read_yaml(str(second.file))
        wrong = [
            Problem(
                str(second.file),
                f"differs from {first.file.name}, and {why}",
                places.of(tuple(path.split("."))),
                path,
            )
            for path in differences(first.deployment, second.deployment)
            if (why := misfit(hypothesis.kind_of_change, path)) is not None
        ]
        if wrong:
            raise PolicyError(*wrong)
    return first, second


def patched(data: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's mapping with each path set; a value replaces what was there, whole."""
    result = copy.deepcopy(dict(data))
    for path, value in patch.items():
        *parents, last = path.split(".")
        here = result
        for name in parents:
            inner = here.get(name)
            if not isinstance(inner, dict):
                inner = here[name] = {}
            here = inner
        here[last] = copy.deepcopy(value)
    return result


def spelled_out(hypothesis: Hypothesis, configured: Sequence[Configured | None]) -> Hypothesis:
    """The same, with all in which a candidate's own file differs from the baseline's as its patch:
    what a change touches is told by paths, wherever they are written."""
    first, second = configured
    other = hypothesis.candidate
    if first is None or second is None or other.config is None:
        return hypothesis
    whole = second.deployment.model_dump(mode="json")
    patch = dict(other.patch)
    for path in sorted(differences(first.deployment, second.deployment)):
        if not any(f"{path}.".startswith(f"{known}.") for known in patch):
            patch[path] = _value(whole, path)
    return hypothesis.model_copy(update={"candidate": other.model_copy(update={"patch": patch})})


def _value(whole: Any, path: str) -> Any:
    """None behind a part that is not there."""
    for name in path.split("."):
        whole = whole.get(name) if isinstance(whole, dict) else None
    return whole


def differences(first: Deployment, second: Deployment) -> list[str]:
    """Paths of the fields in which two policies differ, as deep as both are mappings."""
    return list(_differences(first.model_dump(), second.model_dump(), ""))


def _differences(first: Any, second: Any, path: str) -> Iterator[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        for name in first.keys() | second.keys():
            inner = f"{path}.{name}" if path else str(name)
            yield from _differences(first.get(name), second.get(name), inner)
    elif first != second:
        yield path


def _configured(file: str | Path, name: str, variant: Variant) -> Configured | None:
    if variant.config is None:
        return None
    policy = Path(file).absolute().parent / Path(variant.config)
    if not policy.exists():
        _, places, _ = read_yaml(str(file))
        there = [one.name for one in policy.parent.glob("*.y*ml")] if policy.parent.is_dir() else []
        path, near = (name, "config"), closest(policy.name, there)
        said = f"{name}.config"
        raise PolicyError(
            Problem(str(file), f"{policy}: no such file", places.of(path), said, near)
        )
    data, places, problems = read_yaml(str(policy))
    _checked(data, str(policy), places, problems)
    return configured(policy, data, file, name, variant)


def configured(
    policy: Path, data: Mapping[str, Any], file: str | Path, name: str, variant: Variant
) -> Configured:
    """A policy's data with a variant's patch, which stands under `name` in the hypothesis `file`.

    Raises PolicyError at the patch.
    """
    data = patched(data, variant.patch)
    try:
        deployment = Deployment.model_validate(data)
    except ValidationError as error:
        raise PolicyError(*_in_patch(file, name, variant, error)) from None
    return Configured(policy, data, deployment)


def _checked(data: Any, file: str, places: Places, problems: list[Problem]) -> Deployment:
    try:
        loaded = Deployment.model_validate(data)
    except ValidationError as error:
        raise PolicyError(*problems, *explain(error, Deployment, file, places)) from None
    if problems:
        raise PolicyError(*problems)
    return loaded


def _in_patch(
    file: str | Path, name: str, variant: Variant, error: ValidationError
) -> Iterator[Problem]:
    """What the schema of policies says of patched values, at their keys in the hypothesis."""
    _, places, _ = read_yaml(str(file))
    for one in explain(error, Deployment, str(file), Places({}, {})):
        key = next((key for key in variant.patch if f"{one.path}.".startswith(f"{key}.")), None)
        path = (name, "patch") if key is None else (name, "patch", key)
        message = one.message if key == one.path else f"{one.path}: {one.message}"
        said = f"{name}.patch" + (f".{key}" if key else "")
        yield Problem(str(file), message, places.of(path), said, one.suggestion)
