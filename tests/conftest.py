"""What every folder shares: the real gateway and worker, started once for the whole run."""

from __future__ import annotations

from tests.end_to_end.stack import stack

__all__ = ["stack"]
