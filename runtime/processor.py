"""What kind of processor this is, by what the system says of it; nothing of what runs on it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_SAID = ("model name", "flags", "Features")
# Instructions that products are computed with; what a kernel says of its mitigations is no matter.
_COMPUTING = re.compile(r"s?sse|avx|amx|fma|f16c|asimd|neon|sve|sme|bf16|i8mm|vfp|rvv")


def name() -> str:
    """As its maker calls it."""
    for line in _lines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def features() -> str:
    """Its instructions for products, in order."""
    words = {
        word
        for line in _lines()
        if line.startswith(_SAID[1:])
        for word in line.partition(":")[2].split()
    }
    return " ".join(sorted(word for word in words if _COMPUTING.match(word)))


def described() -> str:
    """All that code which is compiled for it depends on, and more."""
    said = sorted({line for line in _lines() if line.startswith(_SAID)})
    return "\n".join(said) or f"{platform.machine()} {platform.processor()}"


def _lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:  # not Linux
        return []
