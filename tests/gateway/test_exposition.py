"""Pages of metrics are what the client library would write: its parsers read the same from both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st
from prometheus_client import CollectorRegistry, exposition as plain
from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain

from gateway.exposition import Format
from gateway.histogram import Histogram

LABELS = ("tier", "model")
BOUNDS = (0.001, 0.5, 20.0)

names = st.tuples(
    st.sampled_from(("standard", "batch")), st.text(st.sampled_from('ab/"\\\n{}=, %ü'), max_size=6)
)
numbers = st.floats(allow_nan=False, min_value=0) | st.integers(0, 10**12)
observed = st.lists(
    st.tuples(names, st.floats(0, 100), st.none() | st.just(("2" * 32, 1764000000.25))), max_size=12
)


def library(by: dict[tuple[str, ...], float], histogram: Histogram) -> CollectorRegistry:
    class Families:
        def collect(self) -> Iterator[Metric]:
            for kind in (GaugeMetricFamily, CounterMetricFamily):
                one = kind(kind.__name__, "What it is.", labels=LABELS)
                for labels, value in by.items():
                    one.add_metric(labels, value)
                yield one
            spread = HistogramMetricFamily("spread", "What it is.", labels=LABELS)
            for labels, series in histogram.series.items():
                so_far, buckets = 0, list[Any]()
                for bound, count, seen in zip(
                    (*BOUNDS, math.inf), series.counts, series.exemplars, strict=True
                ):
                    so_far += count
                    named = ("+Inf" if bound == math.inf else str(bound), so_far)
                    trace = seen and Exemplar({"trace_id": seen.trace_id}, seen.value, seen.at)
                    buckets.append((*named, trace) if trace else named)
                spread.add_metric(labels, buckets, series.total)
            yield spread

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Families())
    return registry


def ours(form: Format, by: dict[tuple[str, ...], float], histogram: Histogram) -> str:
    parts = []
    for kind, suffix in (("gauge", ""), ("counter", "_total")):
        name = f"{kind.title()}MetricFamily"
        parts.append(form.head(name, kind, "What it is."))
        parts.append(form.samples(name + suffix, LABELS, by))
    parts.append(form.head("spread", "histogram", "What it is."))
    parts += form.buckets("spread", LABELS, histogram)
    return "".join((*parts, form.end))


@pytest.mark.parametrize("openly", [False, True])
@given(by=st.dictionaries(names, numbers, max_size=4), values=observed)
def test_the_library_reads_what_it_would_have_written(
    openly: bool, by: dict[tuple[str, ...], float], values: list[Any]
) -> None:
    """Names, labels with whatever a model is called, values, buckets and exemplars."""
    histogram = Histogram(BOUNDS)
    for labels, value, trace in values:
        histogram.observe(labels, value, trace)
    write, read = (
        (openmetrics.generate_latest, read_openmetrics)
        if openly
        else (plain.generate_latest, read_plain)
    )
    reference: bytes = write(library(by, histogram))
    wanted = list(read(reference.decode()))
    assert list(read(ours(Format(openly), by, histogram))) == wanted
