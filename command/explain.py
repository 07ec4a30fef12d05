"""`headgate explain`: a receipt, from a file or a gateway, for the program that decides again."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.parse
from pathlib import Path

from command.answers import AnswerError, WrongUsage, key_of
from command.asking import ADMIN, CLIENT, Refused, asked, complain
from command.chat import base_url


def explain(receipt: str, url: str | None, policy: Path | None, *, as_json: bool) -> int:
    """The exit code."""
    try:
        told = _read(receipt, url)
    except (Refused, AnswerError, OSError) as error:  # the last of a file
        return complain(error)
    # Deciding is the gateway's: this only starts it, with our packages wherever it starts.
    command = [sys.executable, "-m", "gateway.explain"]
    if policy is not None:
        command += ["--policy", str(policy.absolute())]
    if as_json:
        command.append("--json")
    root = str(Path(__file__).resolve().parent.parent)
    code = subprocess.run(command, input=told, cwd=root, check=False).returncode
    return code if code >= 0 else 128 - code  # its reader had seen enough, as shells tell it


def _read(receipt: str, url: str | None) -> bytes:
    """Raises Refused, AnswerError, OSError."""
    if Path(receipt).is_file():
        told = Path(receipt).read_bytes()
        try:
            json.loads(told)
        except (ValueError, RecursionError) as error:
            raise WrongUsage(f"{receipt}  is no receipt, and no JSON: {error}") from None
        return told
    path = "" if receipt == "all" else f"/{urllib.parse.quote(receipt, safe='')}"
    base = base_url(url)
    if key_of(ADMIN):  # of all tenants
        try:
            return asked(f"{base}/admin/receipts{path}", ADMIN)
        except Refused as refused:  # that gateway has another operator, or none; we may be a client
            if refused.status not in (401, 403) or not key_of(CLIENT):
                raise
    return asked(f"{base}/v1/receipts{path}", CLIENT)
