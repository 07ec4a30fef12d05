"""One replica, our own worker or any OpenAI-compatible server, and what is known of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.breaker import Circuit
from gateway.problems import listing, quote
from policies.discovery import Kind
from policies.kv_following import FollowedEvents
from policies.load import worker_key
from policies.retrying import Breaker
from policies.schema import Deployment
from runtime.wire import RUN_TOKEN_ENV

TTFT_WEIGHT = 0.2  # of the latest first token

log = logging.getLogger("headgate.gateway")


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What other gateways have under way on a replica, as last heard (gateway/others.py)."""

    running: float = 0.0
    tokens: float = 0.0  # of prompts that are still to be prefilled


NOTHING = Elsewhere()


@dataclass(slots=True, eq=False)
class Replica:
    """One server and what we know of it. `models` keeps what was last learned, also while down."""

    url: str
    own: bool = False
    api_key: str | None = field(default=None, repr=False)
    run_token: str | None = field(default=None, repr=False)  # which our own workers must know
    kind: Kind = "openai"
    weight: float = 1.0
    draining: bool = False  # takes nothing new
    held: str = ""  # why it takes nothing new, where an operator has said so (gateway/drains.py)
    gone: bool = False  # not named by its source any more: it leaves when it is idle
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fingerprint: str | None = None  # what it said last of all that makes its answers
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)  # as its /health tells them
    healthy: bool = False
    in_flight: int = 0
    waiting_tokens: int = 0  # of prompts sent from here that have no first token yet
    elsewhere: Elsewhere = NOTHING
    circuit: Circuit = field(default_factory=lambda: Circuit(Breaker()), repr=False)
    rests_until: float = 0.0  # loop time; it is busy, and others are asked first
    continues: bool = True  # an open assistant's turn has not been refused yet
    ttft_s: float | None = None  # to first tokens of late, recent ones weighing more
    error: str | None = None
    tokenizer: Path | None = None  # a model folder
    publishes: FollowedEvents | None = None  # KV-cache events, where its policy says so
    tried: bool = False  # an own worker that was ready once, a foreign server that was asked once
    doubt: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes it the same server to us after a change of policy."""
        return self.url, self.own, self.api_key, self.run_token, self.tokenizer

    def mark_down(self, error: str) -> None:
        """Takes no more requests until a probe, which is asked for at once, finds it well."""
        if self.healthy or not (self.own or self.tried):  # our own ones are refused while they load
            log.warning("replica %s is down: %s", self.url, error)
        self.healthy = False
        self.fingerprint = None
        self.error = error
        self.tried = self.tried or not self.own
        self.doubt.set()

    def mark_ready(self) -> None:
        if not self.healthy and self.tried:
            log.warning("replica %s is ready: %s", self.url, listing(list(self.models)))
        self.healthy = self.tried = True
        self.error = None

    def takes(self, now: float) -> bool:
        """Whether a request may be sent to it, as far as its failures go and it is not to rest."""
        return not (self.draining or self.held) and self.circuit.allows(now)

    @property
    def spared(self) -> bool:
        """Whether it takes nothing new, by its policy or source, or by an operator's word."""
        return self.draining or bool(self.held)

    def adopt(self, newer: Replica, breaker: Breaker) -> None:
        """Goes by what a new policy says of the same server."""
        self.kind, self.weight, self.draining = newer.kind, newer.weight, newer.draining
        self.publishes = newer.publishes
        self.gone = False
        self.circuit.policy = breaker

    def saw_ttft(self, took_s: float) -> None:
        before_s = took_s if self.ttft_s is None else self.ttft_s
        self.ttft_s = before_s + TTFT_WEIGHT * (took_s - before_s)

    def state(self) -> str:
        """For messages: where it is and how it is."""
        if self.spared:
            by_hand = " (an operator drained it)" if self.held else ""  # clients are not told why
            return f"{self.url} takes nothing new{by_hand}"
        if self.healthy and self.circuit.trial_at is not None:
            return f"{self.url} is well by its health and failed its last requests"
        if self.healthy:
            return f"{self.url} is ready"
        return (
            f"{self.url} is {'down' if self.tried else 'starting'}: {self.error or 'not asked yet'}"
        )


def replicas_of(
    policy: Deployment,
    workers: Sequence[str],
    environ: Mapping[str, str],
    tokenizer: Path | None = None,
) -> list[Replica]:
    """Own workers by their URLs, then the policy's upstreams. `tokenizer` is our own workers'.

    Raises KeyError for a key that is not set, or empty.
    """
    token = environ.get(RUN_TOKEN_ENV)
    own_key = worker_key(policy.runtime, environ)
    own = [
        Replica(
            url.rstrip("/"),
            own=True,
            api_key=own_key,
            run_token=token,
            kind="headgate",
            tokenizer=tokenizer,
        )
        for url in workers
    ]
    foreign = []
    for upstream in policy.upstreams:
        name = upstream.api_key_env
        key = environ.get(name, "").strip() if name else None
        if key == "":  # "Authorization: Bearer " with nothing behind it helps nobody
            raise KeyError(name)
        foreign.append(
            Replica(
                upstream.url,
                api_key=key,
                kind=upstream.kind,
                weight=upstream.weight,
                draining=upstream.drain,
                tokenizer=Path(upstream.tokenizer) if upstream.tokenizer else None,
                publishes=upstream.kv_events,
            )
        )
    return own + foreign


def describe(error: Exception) -> str:
    """An error of a connection as a few words, bounded."""
    return quote(str(error) or type(error).__name__)
