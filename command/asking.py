"""One question to a gateway, as commands ask it that show what it knows. Knows its address, keys
and errors; not what an answer means."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import click

from command.answers import KEY_VARIABLE, AnswerError, WrongUsage, key_of
from command.screen import plain

ADMIN, CLIENT = "HEADGATE_ADMIN_KEY", KEY_VARIABLE  # whose key each holds
TIMEOUT_S = 30.0
ERROR_CHARS = 300
FAR = 1e15  # seconds, tokens; nothing that is told is more


class Refused(Exception):
    """The gateway understood, and has it not or does not do it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def asked(where: str, *variables: str, body: Any = None) -> bytes:
    """What answers at the URL `where`: to GET, or to POST with a `body` that is sent as JSON. The
    key is that of the first of these variables that is set.

    Raises Refused for an error that was answered, AnswerError where nobody answers, and its
    WrongUsage where the key of the environment cannot be sent.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(where, data=data)  # noqa: S310  # http(s)
    sent = next((one for one in variables if key_of(one)), None)
    for name, value in key_of(sent).items() if sent else ():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        keys = _keys(variables, sent) if error.code in (401, 403) else ""
        raise Refused(error.code, f"{where} answered {error.code}: {_why(error)}{keys}") from None
    except http.client.HTTPException:
        raise AnswerError(
            f"{where} did not answer by HTTP: no gateway of Headgate is there; give its address "
            "with --url"
        ) from None
    except OSError as error:
        raise AnswerError(
            f"nothing answers at {where} ({getattr(error, 'reason', error)}); start one by "
            "`headgate serve`, or give a gateway's address with --url"
        ) from None


def complain(error: Exception) -> int:
    """Says why nothing came of a command; its exit code: 2 for what asking again would not mend."""
    click.echo(plain(str(error)), err=True)
    return 2 if isinstance(error, Refused | WrongUsage) else 1


def numbered(text: bytes) -> Any:
    """The JSON, with numbers that can be drawn; None for what is none."""
    try:
        return json.loads(text, parse_float=_real, parse_constant=_real, parse_int=_whole)
    except (ValueError, RecursionError):
        return None


def has(told: Any, fields: Mapping[str, type | tuple[type, ...]]) -> bool:
    """An object with these fields, each of its type."""
    return isinstance(told, dict) and all(
        isinstance(told.get(name, ...), kind) for name, kind in fields.items()
    )


def _real(text: str) -> float:
    """Raises ValueError."""
    if not abs(value := float(text)) < FAR:
        raise ValueError(f"{text} is no time")
    return value


def _whole(text: str) -> int:
    return int(text) if _real(text) else 0


def _keys(variables: Sequence[str], sent: str | None) -> str:
    """Where the key that was sent came from, or would have."""
    told = f" ({sent or variables[0]} is sent along)"
    return told if sent else f"{told}, which is not set"


def _why(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return "and broke off"
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return text[:ERROR_CHARS]
