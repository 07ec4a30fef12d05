"""The load and the upstream between which gateways are measured."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import gateway_cost
from benchmarks.lab.edge_load import Load, drive
from benchmarks.lab.edges import OURS, listening, running
from benchmarks.lab.report import MeasurementFailed


def test_a_load_counts_requests_and_chunks_directly_and_through_the_gateway() -> None:
    """Whole answers, a burst and paced chunks; what the gateway's processes took is told."""
    with listening("mock_upstream") as port, running(OURS, port) as edge:
        for load in (Load(2, 3), Load(2, 2, 25), Load(3, 1, 5, 2)):
            for target, key in ((port, None), (edge.port, edge.key)):
                driven = asyncio.run(drive(target, load, key))
                assert len(driven.latencies_s) == load.connections * load.each
                assert driven.chunks == len(driven.latencies_s) * load.chunks
        assert edge.cpu_s() > 0
        assert edge.rss_mb() > 10


def test_an_answer_that_is_none_is_not_measured() -> None:
    """A refusal costs less than an answer, and must not count as one."""
    with listening("mock_upstream") as port, running(OURS, port) as edge:  # noqa: SIM117  # the error is ours
        with pytest.raises(MeasurementFailed, match="a gateway answered"):
            asyncio.run(drive(edge.port, Load(1, 1), "a-wrong-key"))


def test_ratios_are_of_the_same_round_and_beside_the_best() -> None:
    """A peer that is the cheapest in one round only counts in that one."""
    rounds = {
        OURS: [{"x": 2.0}, {"x": 3.0}, {"x": 8.0}],
        "a": [{"x": 1.0}, {"x": 6.0}, {"x": 4.0}],
        "b": [{"x": 4.0}, {"x": 2.0}, {"x": 4.0}],
    }
    assert gateway_cost._ratio(rounds, "x", ("a", "b")) == 2.0
