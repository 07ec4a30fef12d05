"""Scores as OpenTelemetry has them: `gen_ai.evaluation.result` events, for a collector.

Only where the environment names one (OTEL_EXPORTER_OTLP_ENDPOINT). Each request that is asked for a
judgement has a span of ours, which the gateway's joins; its scores are events of that span.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from telemetry import Observation
from telemetry.genai import JUDGED, counted, evaluated
from telemetry.otlp import Collector, Exporter
from telemetry.trace import SAMPLED, Context, Event, Span, named, traceparent

SERVICE = "headgate-evals"


class Evaluations:
    """Of one run."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._run = secrets.token_hex(8)

    def header(self, item: str, arm: str, source: str, block: int, repeat: int) -> str:
        """The `traceparent` of one request."""
        context = self._context(item, arm, source, block, repeat)
        return traceparent(context.trace_id, context.span_id, context.flags)

    def tell(self, observations: Sequence[Observation], began_s: float) -> None:
        """Their scores; `began_s`: what their moments count from, in seconds since 1970."""
        for seen in observations:
            context = self._context(seen.id, seen.arm, seen.source, seen.block, seen.repeat)
            span = span_of(seen, context, began_s)
            self._exporter.put(partial(list, [span]))

    def _context(self, *parts: object) -> Context:
        return named(self._run, *parts)


@contextlib.contextmanager
def evaluations(environ: Mapping[str, str] | None = None) -> Iterator[Evaluations | None]:
    """None where nobody collects."""
    collector = Collector.named(None, os.environ if environ is None else environ)
    if collector is None:
        yield None
        return
    exporter = Exporter(collector)
    try:
        yield Evaluations(exporter)
    finally:
        exporter.close()


def span_of(seen: Observation, context: Context, began_s: float) -> Span:
    start_s = began_s + seen.at_s
    end_s = start_s + (seen.e2e_s or 0.0)
    told = {
        "headgate.evaluation.source": seen.source,
        "headgate.evaluation.item": seen.id,
        "headgate.arm": seen.arm,
        "headgate.outcome": seen.outcome,
        **counted(seen.prompt_tokens, seen.completion_tokens, seen.cached_tokens),
    }
    if seen.fingerprint:
        told["headgate.config.fingerprint"] = seen.fingerprint
    return Span(
        context.trace_id,
        context.span_id,
        "",
        f"evaluate {seen.source}",
        SERVICE,
        "CLIENT",
        start_s,
        end_s,
        "UNSET" if seen.ok else "ERROR",
        told,
        [Event(JUDGED, time.time(), evaluated(name, score)) for name, score in seen.scores.items()],
        SAMPLED,
    )
