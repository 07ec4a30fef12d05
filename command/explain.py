"""`headgate explain`: a receipt, from a file or a gateway, for the program that decides again."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import click

from command.answers import AnswerError
from command.chat import base_url

KEY_VARIABLE = "HEADGATE_API_KEY"
TIMEOUT_S = 30.0


class NoReceipt(Exception):
    """The gateway has no such receipt."""


def explain(receipt: str, url: str | None, policy: Path | None, *, as_json: bool) -> int:
    """The exit code."""
    try:
        told = _read(receipt, url)
    except NoReceipt as error:
        click.echo(str(error), err=True)
        return 2
    except (AnswerError, OSError) as error:
        click.echo(str(error), err=True)
        return 1
    # Deciding is the gateway's: this only starts it, with our packages wherever it starts.
    command = [sys.executable, "-m", "gateway.explain"]
    if policy is not None:
        command += ["--policy", str(policy.absolute())]
    if as_json:
        command.append("--json")
    root = str(Path(__file__).resolve().parent.parent)
    return subprocess.run(command, input=told, cwd=root, check=False).returncode


def _read(receipt: str, url: str | None) -> bytes:
    """Raises NoReceipt, AnswerError, OSError."""
    if Path(receipt).is_file():
        return Path(receipt).read_bytes()
    path = "" if receipt == "all" else f"/{urllib.parse.quote(receipt, safe='')}"
    request = urllib.request.Request(f"{base_url(url)}/v1/receipts{path}")  # noqa: S310  # http(s)
    if key := os.environ.get(KEY_VARIABLE):
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        raise NoReceipt(f"{request.full_url} answered {error.code}: {text[:300]}") from None
