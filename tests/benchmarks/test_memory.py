"""What is said of a worker's memory, and that it is read from a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lab import models
from benchmarks.lab.footprint import Footprint, footprint
from benchmarks.lab.report import MeasurementFailed
from benchmarks.memory import told

NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def test_what_is_beyond_counts_the_larger_peak_and_loading_only_the_model():
    """Weights and pool are taken off the whole; the share compares models without the base."""
    found = Footprint(1600.0, 1500.0, 1700.0, 1500.0, 90.0, kv=100.0, held={"fp32": 3, "w8": 1})
    said = told(found, weights=1000.0, base=400.0)
    assert said["beyond"] == 600.0
    assert said["loading_share"] == pytest.approx(1200 / 1100)
    assert said["held"] == "fp32 3, w8 1"


@NEEDS_PROC
def test_a_worker_is_started_asked_and_measured(tmp_path):
    """Peaks are not below what is there at their end, and the pool is the one asked for."""
    folder = models.make(models.TINY, tmp_path)
    found = footprint({"model": str(folder), "kv_tokens": 512, "threads": 1}, 40, 2)
    assert 50 < found.loaded <= found.peak_loading < 4000
    assert 50 < found.rest <= found.peak_serving < 4000
    assert 0 < found.files < found.rest
    # Layers, keys and values, tokens and the block that nobody has, heads' widths, fp32.
    assert found.kv == pytest.approx(2 * 2 * (512 + 16) * 32 * 4 / 1e6)
    assert sum(found.held.values()) > 0


@NEEDS_PROC
def test_a_worker_that_refuses_its_model_is_quoted(tmp_path):
    """The reason stands in the worker's own words."""
    with pytest.raises(MeasurementFailed, match="exit code"):
        footprint({"model": str(tmp_path), "kv_tokens": 512}, 40, 2)
