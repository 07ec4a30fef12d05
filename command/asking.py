"""One question to a gateway, as commands ask it that show what it knows. Knows its address, keys
and errors; not what an answer means."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any

from command.answers import AnswerError

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
    if key := os.environ.get(key_variable, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise AnswerError(
                f"{key_variable} has letters that no key has: line ends, or not ASCII"
            )
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        raise Refused(f"{where} answered {error.code}: {_why(error)}") from None
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
