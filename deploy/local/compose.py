"""What a compose file says of processes: commands, environment, files, health checks, order.

Knows the part of the Compose Specification that ours uses, and no ports or folders of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_REFERENCE = re.compile(
    rf"\$(?:(?P<escaped>\$)|(?P<bare>{_NAME})|\{{(?P<name>{_NAME})(?P<rule>:?[-+?]|(?=\}})))"
)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_PORT_MAX = 65535
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class ComposeError(Exception):
    """What of a compose file cannot be run: where, why, what to do."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A path of this machine, or the name of a volume, as the service sees it."""

    source: str
    target: str

    @property
    def is_volume(self) -> bool:
        return not self.source.startswith((".", "/", "~"))


@dataclass(frozen=True, slots=True)
class Check:
    """A command that ends with 0 while the service is well, and how often it is asked at first."""

    argv: tuple[str, ...]
    every_s: float


@dataclass(frozen=True, slots=True)
class Service:
    """One service, with its variables filled in."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: tuple[Mount, ...]
    scratch: tuple[str, ...]  # folders that begin empty
    ports: tuple[int, ...]  # where it listens
    published: Mapping[int, int]  # of these, where this machine's users find them
    needs: Mapping[str, bool]  # others that it is started after; True: once they are well
    check: Check | None
    stop_signal: str
    grace_s: float  # between that signal and SIGKILL


def read(file: Path, environ: Mapping[str, str]) -> list[Service]:
    """The services that run without a profile, those that others need first. Raises
    ComposeError."""
    try:
        whole = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except (OSError, YAMLError) as error:
        raise ComposeError(f"{file}: {error}") from None
    whole = _filled(whole, environ)
    running = {name: told for name, told in whole["services"].items() if not told.get("profiles")}
    services = {name: _service(name, told, running) for name, told in running.items()}
    return list(_in_order(services))


def _service(name: str, told: Mapping[str, Any], running: Mapping[str, Any]) -> Service:
    published = dict(_published(port) for port in told.get("ports", ()))
    check = told.get("healthcheck")
    needs = {
        other: rule["condition"] == "service_healthy"
        for other, rule in told.get("depends_on", {}).items()
        if other in running or rule.get("required", True)
    }
    if lost := [other for other in needs if other not in running]:
        raise ComposeError(f"{name} needs {', '.join(lost)}, which has a profile or does not exist")
    return Service(
        name,
        (*told.get("entrypoint", ()), *told.get("command", ())),
        {variable: str(value) for variable, value in told.get("environment", {}).items()},
        tuple(_mount(volume) for volume in told.get("volumes", ())),
        tuple(folder.partition(":")[0] for folder in told.get("tmpfs", ())),
        tuple(dict.fromkeys([*map(int, told.get("expose", ())), *published])),
        published,
        needs,
        Check(tuple(check["test"][1:]), duration_s(check["start_interval"])) if check else None,
        told.get("stop_signal", "SIGTERM"),
        duration_s(told.get("stop_grace_period", "10s")),
    )


def _published(port: str) -> tuple[int, int]:
    """`127.0.0.1:8080:80` -> 80, 8080. Raises ComposeError."""
    *_, ours, theirs = port.split(":")
    for one in (ours, theirs):
        if not (one.isdecimal() and one.isascii() and int(one) <= _PORT_MAX):
            raise ComposeError(f"ports: {port}: expected a port from 0 to {_PORT_MAX}, got {one!r}")
    return int(theirs), int(ours)


def _mount(volume: str) -> Mount:
    source, target, *_ = volume.split(":")
    return Mount(source, target)


def _in_order(services: Mapping[str, Service]) -> Iterator[Service]:
    left = dict(services)
    while left:
        free = [name for name, service in left.items() if not left.keys() & service.needs.keys()]
        if not free:
            raise ComposeError(f"these need each other: {', '.join(left)}")
        yield from (left.pop(name) for name in free)


def duration_s(text: str) -> float:
    """`1m30s` in seconds. Raises ComposeError."""
    if not re.fullmatch(rf"(?:{_DURATION.pattern})+", text):
        raise ComposeError(f"{text!r} is not a duration such as 30s or 1m30s")
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(text))


# ---- variables ----------------------------------------------------------------------------------


def _filled(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(one, environ) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, environ) for one in value]
    return interpolate(value, environ) if isinstance(value, str) else value


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Text with `$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME:+instead}`, `${NAME:?why}`, `$$`
    filled in, as the specification has it. Raises ComposeError where one has to be set."""
    parts, at = [], 0
    while found := _REFERENCE.search(text, at):
        parts.append(text[at : found.start()])
        at = found.end()
        if found["escaped"]:
            parts.append("$")
        elif found["bare"]:
            parts.append(environ.get(found["bare"], ""))
        else:
            end = _closing(text, at)
            parts.append(_value(found["name"], found["rule"], text[at:end], environ))
            at = end + 1
    return "".join([*parts, text[at:]])


def _closing(text: str, at: int) -> int:
    """Where the brace is that closes one which was opened before `at`."""
    depth = 1
    for place in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ComposeError(f"{text!r}: a brace is not closed")


def _value(name: str, rule: str, rest: str, environ: Mapping[str, str]) -> str:
    value = environ.get(name)
    missing = value is None or (value == "" and rule.startswith(":"))
    if rule.endswith("+"):
        return "" if missing else interpolate(rest, environ)
    if not missing or not rule:
        return value or ""
    if rule.endswith("?"):
        raise ComposeError(f"the environment variable {name} is not set: {rest}")
    return interpolate(rest, environ)
