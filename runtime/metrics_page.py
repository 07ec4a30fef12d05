"""The metrics of one worker as a page of Prometheus text, made when somebody asks.

Knows exposition; what there is to tell stands in metrics.py. The engine's thread never waits for a
page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from runtime.distribution import Distribution
from runtime.kv import BLOCK_TOKENS
from runtime.metrics import FAMILIES, Reading, Value

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.events import BlockEvents
    from runtime.fingerprint import Fingerprint
    from runtime.tally import Tally

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Page(Collector):
    """The metrics of one worker. `text` may be called from any thread, one at a time."""

    def __init__(
        self,
        tally: Tally,
        engine: Engine,
        *,
        model_name: str,
        rank: int,
        identity: Fingerprint,
        events: BlockEvents | None = None,
        late_tokens: Callable[[], int] = lambda: 0,
    ) -> None:
        """`late_tokens`: that were made for clients that had left."""
        self.tally = tally
        self._engine = engine
        self._common = {"model_name": model_name, "engine": str(rank)}
        self._facts = {
            "version": str((identity.facts["engine"] or {}).get("headgate")),
            "system_fingerprint": identity.short,
            "device": str(engine.model.device),
            "dtype": str(engine.model.dtype).removeprefix("torch."),
        }
        self._quantized = {
            "weights": engine.model.weights.rounds,
            "kv": engine.model.kv_rounds,
        }
        self._events = events
        self._late_tokens = late_tokens
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """The page as Prometheus reads it, format 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        reading = self._read()
        for kind, families in FAMILIES.items():
            for family in families:
                values = family.read(reading)
                by = values if isinstance(values, Mapping) else {(): values}
                for name in family.names:
                    metric = kind(name, family.text, labels=[*self._common, *family.labels])
                    for own, value in by.items():
                        _add(metric, [*self._common.values(), *own], value)
                    yield metric

    def describe(self) -> list[Metric]:
        """Nothing is asked of the engine when the page is made."""
        return []

    def _read(self) -> Reading:
        load = self._engine.load()
        cache = {
            "block_size": str(BLOCK_TOKENS),
            "num_gpu_blocks": str(load.blocks.total),
            "enable_prefix_caching": "True",
        }
        events = self._events.numbers() if self._events is not None else {}
        steps, swap = self._engine.clock.steps, self._engine.swap
        tiers = swap.tiers.counts() if swap is not None else {}
        counts = swap.counts if swap is not None else None
        speculation = self._engine.speculation
        guesses = speculation.counts if speculation is not None else None
        return Reading(
            self.tally, load, steps, events, tiers, counts, cache, self._facts, guesses,
            self._quantized, self._late_tokens(),
        )  # fmt: skip


def _add(metric: Metric, labels: list[str], value: Value) -> None:
    if isinstance(metric, HistogramMetricFamily):
        assert isinstance(value, Distribution), f"{metric.name} is a histogram"
        buckets, total = value.read()
        metric.add_metric(labels, buckets, total)
        return
    assert isinstance(metric, CounterMetricFamily | GaugeMetricFamily)
    assert not isinstance(value, Distribution), f"{metric.name} is a number"
    metric.add_metric(labels, value)
