"""What a request belongs to, and whether it is of the share that is recorded. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import orjson

TOLD_BY_CHARS = 512  # of the beginning and of the end of a first message
SESSION_FIELDS = ("prompt_cache_key", "user")


def session_of(named: str | None, data: Mapping[str, Any], tenant: str) -> str:
    """What a request belongs to: as a header named it, or a field of its body; else by the first
    thing that a user said, which is the same in every turn of a conversation; empty where there is
    neither."""
    fields = (data.get(name) for name in SESSION_FIELDS)
    named = named or next((one for one in fields if isinstance(one, str) and one), None)
    if named is None:
        first = _first_said(data.get("messages"))
        if first is None:
            return ""
        text = first if isinstance(first, str) else orjson.dumps(first).decode()
        known = f"{len(text)} {text[:TOLD_BY_CHARS]} {text[-TOLD_BY_CHARS:]}"
        named = blake2b(known.encode("utf-8", "replace"), digest_size=16).hexdigest()
    return f"{tenant}/{named}"


def _first_said(messages: Any) -> Any:
    for one in messages if isinstance(messages, list) else ():
        if isinstance(one, dict) and one.get("role") == "user":
            return one.get("content")
    return None


def within_share(name: str, share: float) -> bool:
    """Whether so named things belong to a share of all of them; always the same ones."""
    if share >= 1:
        return True
    digest = blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 < share
