"""Whether an installed version keeps a requirement's bounds. Numbers only, no other library."""

from __future__ import annotations

import re


def within(have: str, bounds: str) -> bool:
    """Whether a version keeps bounds such as `>=5.17,<6`; suffixes such as `+cpu` do not count."""
    for bound in filter(None, (part.strip() for part in bounds.split(","))):
        match = re.match(r"(>=|<=|==|!=|~=|<|>)\s*([\w.+!]+)", bound)
        if match is None:
            continue
        mine, limit = _release(have), _release(match[2])
        width = max(len(mine), len(limit))
        a, b = (release + (0,) * (width - len(release)) for release in (mine, limit))
        keeps = {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}
        if not keeps.get(match[1], a >= b):
            return False
    return True


def _release(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()
