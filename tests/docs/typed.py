"""Words that are typed and not run: whether the program, the command and its options exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import click

from headgate import main

ROOT = Path(__file__).parents[2]
# Programs of others that a page may name: what they take is not ours to know.
FOREIGN = {
    "cp", "docker", "git", "gh", "helm", "kubectl", "pip", "ray", "source", "vllm",
}  # fmt: skip
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


def complaint(command: str) -> str | None:
    """What is wrong with it, or None."""
    for line in re.split(r"\n|&&", command.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        if words and (wrong := _wrong(words)):
            return f"{line}: {wrong}"
    return None


def _wrong(words: list[str]) -> str | None:
    program, *rest = words
    if program == "headgate":
        return _unknown_option(rest)
    if program == "make":
        return _no_target(rest)
    if program == "python" and rest[:1] == ["-m"]:
        found = importlib.util.find_spec(rest[1])
        return None if found else f"there is no module {rest[1]}"
    return None if program in FOREIGN else f"nobody knows the program {program}"


def _unknown_option(words: list[str]) -> str | None:
    """Read as click would, without running it."""
    command: click.Command = main
    context = click.Context(main, info_name="headgate")
    while isinstance(command, click.Group):
        name = words.pop(0) if words else ""
        found = command.get_command(context, name)
        if found is None:
            return f"headgate has no command {name!r}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    try:
        command.parse_args(context, words)
    except click.UsageError as error:
        return error.format_message()
    return None


def _no_target(words: list[str]) -> str | None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = [word for word in words if "=" not in word]
    unknown = [word for word in asked if word not in targets]
    return f"the Makefile has no {unknown[0]}" if unknown else None
