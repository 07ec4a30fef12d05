"""One question to a gateway, as commands ask it that show what it knows. Knows its address, keys
and errors; not what an answer means."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from command.answers import AnswerError, key_of

TIMEOUT_S = 30.0
ERROR_CHARS = 300


class Refused(Exception):
    """The gateway understood, and has it not or does not do it."""


def asked(where: str, key_variable: str, body: Any = None) -> bytes:
    """What answers at the URL `where`: to GET, or to POST with a `body` that is sent as JSON.

    Raises Refused for an error that was answered, AnswerError where nobody answers or the key of
    the environment cannot be sent.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(where, data=data)  # noqa: S310  # http(s)
    for name, value in key_of(key_variable).items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        sent = f" ({key_variable} is sent along)" if error.code == 401 else ""
        raise Refused(f"{where} answered {error.code}: {_why(error)}{sent}") from None
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


def _why(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return "and broke off"
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return text[:ERROR_CHARS]
