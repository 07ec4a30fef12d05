"""`GET /metrics` of the gateway: every metric, what it means and where its number stands.

Labels are few and bounded: tiers, arms and invariants are the policy's or ours, models are those
that replicas have named, replicas those that there are. A tenant, a user or a session is no label:
nobody bounds how many there are, and what a tenant does is no other's to read. docs/metrics.md
describes every metric; each module here has those of one subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gateway.exposition import Format
from gateway.metrics import changes, process, replicas, requests, tokens
from gateway.metrics.family import PREFIX, Family, Reading
from gateway.metrics.requests import HISTOGRAMS

__all__ = ["COUNTERS", "GAUGES", "HISTOGRAMS", "OF_ANSWERS", "TOLD", "Reading", "families"]

GAUGES = (*process.GAUGES, *requests.GAUGES, *replicas.GAUGES, *changes.GAUGES)
COUNTERS = (*process.COUNTERS, *requests.COUNTERS, *replicas.COUNTERS, *tokens.COUNTERS)
OF_ANSWERS = ("tier", "model", "arm")  # labels of histograms

# Of several processes behind one port, which one page tells of (gateway/scrape.py).
TOLD = Family(
    PREFIX + "process_told",
    "1 for each process behind this port whose samples are on this page, 0 for one that has not "
    "answered; absent where there is one process.",
    lambda _: {},
    ("process",),
)


def families(reading: Reading, form: Format) -> Iterator[tuple[str, str, Iterator[str]]]:
    """The name of each metric, its head, and its samples in pieces."""
    for kind, found in (("gauge", GAUGES), ("counter", COUNTERS)):
        for family in found:
            head = form.head(family.name, kind, family.text)
            yield family.name, head, _samples(family, kind, reading, form)
    for name, text, read in HISTOGRAMS:
        yield (
            name,
            form.head(name, "histogram", text),
            form.buckets(name, OF_ANSWERS, read(reading)),
        )


def _samples(family: Family, kind: str, reading: Reading, form: Format) -> Iterator[str]:
    values = family.read(reading)
    by: Mapping[tuple[str, ...], float]
    by = values if isinstance(values, Mapping) else {(): values}
    name = family.name + ("_total" if kind == "counter" else "")
    yield form.samples(name, family.labels, by)
