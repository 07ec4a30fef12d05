"""Words that are typed and not run: whether the program, the command and its options exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click

from headgate import main

ROOT = Path(__file__).parents[2]
# Programs of others that a page may name: what they take is not ours to know.
FOREIGN = {
    "cp", "curl", "docker", "git", "gh", "helm", "kubectl", "pip", "ray", "source", "vllm",
}  # fmt: skip
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_OURS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:headgate [a-z-]+|python3? -m [a-z_.]+|make [a-z]+)\b")


def commands(page: str) -> Iterator[str]:
    """All of ours that a page shows, in blocks and within sentences."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", page, flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if _OURS.match(line.removeprefix("$ ")):
                yield re.split(r"[|>;&#]|  +\S+ ", line.removeprefix("$ "))[0]
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)):
        if _OURS.match(span):
            yield span


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
    if program in ("python", "python3") and rest[:1] == ["-m"]:
        found = importlib.util.find_spec(rest[1])
        return None if found else f"there is no module {rest[1]}"
    return None if program in FOREIGN else f"nobody knows the program {program}"


def _unknown_option(words: list[str]) -> str | None:
    """Command and options as click knows them; files and values are the reader's."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        found = command.get_command(click.Context(command), name)
        if found is None:
            return f"headgate has no command {name!r}"
        command = found
    known = {one for option in command.params for one in option.opts} | {"--help"}
    asked = (word.strip("[]").partition("=")[0] for word in words if word.lstrip("[")[:2] == "--")
    unknown = [one for one in asked if one not in known]
    return f"there is no {unknown[0]}" if unknown else None


def _no_target(words: list[str]) -> str | None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = [word for word in words if "=" not in word]
    unknown = [word for word in asked if word not in targets]
    return f"the Makefile has no {unknown[0]}" if unknown else None
