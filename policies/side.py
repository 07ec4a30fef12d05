"""One configuration as what it is made of: a digest a leaf, and one root over all of them.

Knows hashing only; `leaves.py` says which leaves there are. docs/binding.md tells the recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHORT_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Side:
    """Leaf -> digest, and the root of all. What has no leaf, such as a draft model, is left out."""

    root: str
    leaves: Mapping[str, str]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Side:
        """By the facts of each leaf; None is none."""
        return cls.over({name: leaf(name, one) for name, one in facts.items() if one is not None})

    @classmethod
    def over(cls, leaves: Mapping[str, str]) -> Side:
        """By digests that are known."""
        root = hashlib.sha256(b"headgate side root 1\0")
        for name in sorted(leaves):
            root.update(name.encode() + b"\1" + bytes.fromhex(leaves[name]))
        return cls(root.hexdigest(), dict(sorted(leaves.items())))


def leaf(name: str, facts: Any) -> str:
    """The digest of one leaf; none can pass for another, or for a root."""
    head = f"headgate fingerprint leaf 1\0{name}\0".encode()
    return hashlib.sha256(head + canonical(facts)).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON in one spelling: keys sorted, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def changed(old: Side, new: Side) -> tuple[str, ...]:
    """The leaves in which two sides differ, those too that only one of them has."""
    names = sorted({*old.leaves, *new.leaves})
    return tuple(name for name in names if old.leaves.get(name) != new.leaves.get(name))
