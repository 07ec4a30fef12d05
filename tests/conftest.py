"""What every folder shares: the real gateway and worker, started once for each process of a run,
how processes share a run, and that no property is about speed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from command.machine import cores
from tests.end_to_end.stack import stack

__all__ = ["stack"]

# An example that took 0.2 s failed, and so did ten that took 1 s to draw: of the thousands of a run
# some do, where the machine is busy.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

TESTS = Path(__file__).parent
# The longest files, the longest first: whoever begins one last is waited for by everybody else.
LONGEST = (
    "end_to_end/test_gate.py",
    "docs/test_commands.py",
    "end_to_end/test_rollout.py",
    "runtime/test_int8_kv.py",
    "runtime/test_oracle.py",
    "benchmarks/test_guessing_peers.py",
    "end_to_end/test_gateway_events.py",
    "end_to_end/test_events.py",
    "runtime/test_constrained.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files keep their tests' order; the longest files come first."""
    ranks = {TESTS / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, for `-n auto`
def pytest_xdist_auto_num_workers() -> int:
    """Tests wait as well as compute, so two at least; they start servers, so four at most."""
    return max(2, min(4, cores()))
