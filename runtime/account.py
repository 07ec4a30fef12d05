"""What the engine tells about itself: each step, each ended sequence, how much there is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

from runtime.costs import StepSize
from runtime.kv import BlockCounts
from runtime.sequence import Sequence


@dataclass(slots=True)
class StepClock:
    """Seconds spent since the start; `step_s - forward_s` is what the engine itself costs."""

    steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, for those who count."""

    size: StepSize
    seconds: float
    forward_s: float


class Listener(Protocol):
    """Hears what happens, in the engine's thread: it has to be quick."""

    def sampled(self, sequences: Many[Sequence], now: float) -> None:
        """Each of them gets a token now; their times are still those of the token before it."""

    def guessed(self, guessed: int, accepted: int, said: int) -> None:
        """A sequence that got a token has said so many in all: `accepted` of them were guesses."""

    def stepped(self, record: StepRecord) -> None: ...

    def ended(self, sequence: Sequence, reason: str, now: float) -> None:
        """`reason` is a finish reason, "abort" for a cancelled one, "error" or "deadline"."""


@dataclass(frozen=True, slots=True)
class Load:
    running: int
    waiting: int
    blocks: BlockCounts
    preemptions: int
    prompt_tokens: int = 0  # of all admitted prompts so far
    cached_tokens: int = 0  # of these, found instead of computed
    evictions: int = 0
    refused: int = 0  # requests that found the queue full
    waiting_for: Mapping[str, int] = field(default_factory=dict)
    asked_tokens: int = 0  # of the prompts of all that were admitted
    hit_tokens: Mapping[str, int] = field(default_factory=dict)  # of these, by tier
