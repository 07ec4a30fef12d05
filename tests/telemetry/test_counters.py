"""The list of counters, for those who may not import the services that count."""

from __future__ import annotations

from gateway import metrics as gateway
from runtime import metrics as runtime
from telemetry.counters import GATEWAY, WORKER


def test_the_list_has_every_counter_that_services_tell_and_no_other() -> None:
    """So that a hypothesis is refused for a misspelled one, and for no other."""
    assert tuple(sorted(name for one in runtime.COUNTERS for name in one.names)) == WORKER
    assert tuple(sorted(one.name for one in gateway.COUNTERS)) == GATEWAY
