"""Words that are typed and not run: whether program, command, options and arguments exist, and of
other programs' words those that name something of ours: a target, a service, a folder."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import click
from ruamel.yaml import YAML

from headgate import main

ROOT = Path(__file__).parents[2]
# Programs of others that a page may name: what they take is not ours to know.
FOREIGN = {"cp", "curl", "git", "gh", "helm", "ray", "source", "vllm"}
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


def complaint(command: str, *, whole: bool = True) -> str | None:
    """What is wrong with it, or None. `whole`: it is typed as it stands, so that what it takes is
    there, too; else it is named in a sentence, where `FILE` or nothing stands for what it takes."""
    for line in re.split(r"\n|&&", command.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        if words and (wrong := _wrong(words, whole)):
            return f"{line}: {wrong}"
    return None


def _wrong(words: list[str], whole: bool) -> str | None:
    program, *rest = words
    if program == "headgate":
        return _unknown_option(rest, whole)
    if program in ("python", "python3") and rest[:1] == ["-m"]:
        found = importlib.util.find_spec(rest[1])
        return None if found else f"there is no module {rest[1]}"
    if check := _NAMES_OURS.get(program):
        return check(rest)
    return None if program in FOREIGN else f"nobody knows the program {program}"


def _unknown_option(words: list[str], whole: bool) -> str | None:
    """Command, options and arguments as click takes them; files are the reader's."""
    command: click.Command = main
    name = "headgate"
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        found = command.get_command(click.Context(command), name)
        if found is None:
            return f"headgate has no command {name!r}"
        command = found
    if whole and not isinstance(command, click.Group):
        try:
            command.make_context(name, words)
        except click.UsageError as error:
            return error.format_message()
        return None
    known = {one for option in command.params for one in option.opts} | {"--help"}
    asked = (word.strip("[]").partition("=")[0] for word in words if word.lstrip("[")[:2] == "--")
    unknown = [one for one in asked if one not in known]
    return f"there is no {unknown[0]}" if unknown else None


def _no_target(words: list[str]) -> str | None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = [word for word in words if "=" not in word]
    unknown = [word for word in asked if word not in targets]
    return f"the Makefile has no {unknown[0]}" if unknown else None


def _docker(words: list[str]) -> str | None:
    """Stages of the Dockerfile, services of compose.yaml, files of both."""
    recipe = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\S+)", recipe, flags=re.MULTILINE)
    services = YAML(typ="safe").load(ROOT / "compose.yaml")["services"]
    profiles = {one for service in services.values() for one in service.get("profiles", ())}
    for option, there in (("--target", stages), ("--profile", profiles)):
        if unknown := [one for one in _values(words, option) if one not in there]:
            return f"there is no {option} {unknown[0]}"
    for file in [*_values(words, "--env-file"), *_values(words, "-f")]:
        if file != ".env" and not (ROOT / file).is_file():  # which deploy.keys writes
            return f"there is no {file}"
    if words[:1] == ["compose"] and "kill" in words:
        said = words[words.index("kill") + 1 :]
        named = [one for one in said if one not in ("--signal", *_values(said, "--signal"))]
        return next((f"there is no service {one}" for one in named if one not in services), None)
    return None


def _kubectl(words: list[str]) -> str | None:
    """Folders that it builds, and keys of a secret that some manifest asks for."""
    folders = [*_values(words, "-k"), *(words[1:2] if words[:1] == ["kustomize"] else ())]
    for folder in folders:
        if not (ROOT / folder / "kustomization.yaml").is_file():
            return f"there is nothing to build in {folder}"
    manifests = "".join(one.read_text() for one in (ROOT / "deploy/kubernetes").rglob("*.yaml"))
    for word in words:
        literal = re.match(r"--from-literal=(\w+)=", word)
        if literal and not re.search(rf"\b{literal[1]}\b", manifests):
            return f"no manifest asks for {literal[1]}"
    return None


def _pip(words: list[str]) -> str | None:
    """Extras of ours."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        asked = re.match(r"(\S*)\[([\w,]+)\]", word)
        if asked and asked[1] in (project["name"], "."):
            unknown = set(asked[2].split(",")) - set(project["optional-dependencies"])
            if unknown:
                return f"there is no extra {min(unknown)}"
    return None


def _values(words: list[str], option: str) -> list[str]:
    return [after for one, after in pairwise(words) if one == option]


_NAMES_OURS: dict[str, Callable[[list[str]], str | None]] = {
    "make": _no_target, "docker": _docker, "kubectl": _kubectl, "pip": _pip,
}  # fmt: skip
