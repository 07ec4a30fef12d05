"""`headgate policy check`, `headgate policy show` and `headgate policy key`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
from pydantic import BaseModel

from policies.enabling import check_optimizations
from policies.load import (
    PORT_VARIABLE,
    PolicyError,
    admin_problems,
    guess_problems,
    load,
    package_problems,
    port_of,
    resolve_adapters,
    resolve_draft,
    resolve_model,
    resolve_tokenizers,
    tier_problems,
)
from policies.schema import Deployment
from policies.slo import key_hash, new_key

# Plain YAML text that no parser could take for anything else than this text.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*|[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+|https?://[\w.:/-]+")
_NOT_TEXT = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def check_files(files: Sequence[Path]) -> int:
    """Prints a line a file, with what may be meant otherwise, or its problems; 0 or 2."""
    wrong = False
    for file in files:
        try:
            deployment = load(file)
            if deployment.runtime:
                resolve_model(file, deployment.runtime)
                resolve_adapters(file, deployment.runtime)
                resolve_draft(file, deployment.runtime)
            guesses = guess_problems(file, deployment.runtime) if deployment.runtime else []
            problems = [
                *guesses,
                *tier_problems(file, deployment),
                *package_problems(file, deployment),
                *admin_problems(file, deployment),
            ]
            if problems:
                raise PolicyError(*problems)
            resolve_tokenizers(file, deployment)
            check_optimizations(file, deployment)
        except PolicyError as error:
            wrong = True
            click.echo(str(error), err=True)
        else:
            click.echo(f"{file}  ok")
            for problem in tier_problems(file, deployment, served_here=True):
                click.echo(f"{problem}; right only behind a gateway that has it")
    return 2 if wrong else 0


def show_file(file: Path, environ: Mapping[str, str]) -> str:
    """The file with every default filled in, as YAML. Raises PolicyError."""
    deployment = load(file)
    port = port_of(environ)
    lines = [f"# {file.name}, every default filled in; `set` marks what the file says."]
    if port is not None:
        lines.append(f"# {PORT_VARIABLE}={port} overrides gateway.port when this is served.")
    return "\n".join([*lines, *_fields(deployment, "")]) + "\n"


def key_lines() -> str:
    """A new key, and what of it stands in a policy."""
    key = new_key()
    return (
        f"key:  {key}\n"
        "      (shown once: give it to the tenant, who sends it as `Authorization: Bearer ...`)\n"
        f"hash: {key_hash(key)}\n"
        "      (for gateway.tenants.NAME.keys in the policy)\n"
    )


def _fields(model: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        mark = "  # set" if name in model.model_fields_set else ""
        if isinstance(value, BaseModel | tuple | dict) or isinstance(model, Deployment):
            yield ""
        yield f"{indent}# {field.description}"
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:{mark}"
            yield from _fields(value, indent + "  ")
        elif isinstance(value, tuple | dict) and value:
            yield f"{indent}{name}:{mark}"
            yield from _entries(value, indent + "  ")
        else:
            yield f"{indent}{name}: {scalar(value)}{mark}"


def _entries(value: tuple[object, ...] | dict[str, object], indent: str) -> Iterator[str]:
    """The members of a list, each behind its dash, or of a mapping, each under its name."""
    named = isinstance(value, dict)
    for head, entry in value.items() if isinstance(value, dict) else (("-", one) for one in value):
        lead = f"{indent}{scalar(head)}:" if named else f"{indent}-"
        if isinstance(entry, BaseModel):
            yield lead
            yield from _fields(entry, indent + "  ")
        else:
            yield f"{lead} {scalar(entry)}"


def scalar(value: object) -> str:
    """A value as YAML 1.2 that reads back as the same value."""
    if value == ():
        return "[]"
    if value == {}:
        return "{}"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT
        return value if plain else f'"{"".join(map(_escaped, value))}"'
    return json.dumps(value)


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
