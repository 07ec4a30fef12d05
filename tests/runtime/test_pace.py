"""Long prompts among chats, on a clock that moves by what the cost table says of each step.

Nothing is measured here, so the figures are the policy's own and the same on every machine;
`benchmarks/chunked_prefill.py` measures the same load on a real engine.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean

import pytest

from runtime.costs import StepCosts, StepSize
from runtime.kv import BlockPool
from runtime.scheduler import Scheduler, step_size
from runtime.sequence import Sampling, Sequence, Service, Times

# A random model of 22 M parameters on one core of an AMD EPYC, in milliseconds.
STEP_MS = {
    1: 8.9,
    2: 10.5,
    4: 12,
    8: 13.6,
    16: 16.8,
    32: 24.3,
    64: 35.7,
    128: 64,
    256: 123,
    512: 250,
}
FIXED = (64, 128, 256, 512)


def costs() -> StepCosts:
    seconds = [each / 1e3 for each in STEP_MS.values()]
    return StepCosts(list(STEP_MS), seconds, decode_token_s=1.2e-6, chunk_pair_s=1.5e-7)


@dataclass
class Request:
    at_s: float
    prompt: int
    new: int
    left_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.left_s[0] - self.at_s

    @property
    def largest_gap_s(self) -> float:
        return max(b - a for a, b in zip(self.left_s, self.left_s[1:], strict=False))


def arrivals(seed: int, load: float) -> list[Request]:
    """Twelve chats and three long prompts, at random over the time that fits the load."""
    table, rng = costs(), random.Random(seed)
    work_s = 12 * table.prefill_s(80) + 3 * table.prefill_s(1550)
    work_s += (12 * 64 + 3 * 16) * table.estimate(StepSize(8)) / 8
    shapes = [((32, 128), 64)] * 12 + [((1200, 1900), 16)] * 3
    made = [
        Request(rng.uniform(0, work_s / load), rng.randint(*prompt), new) for prompt, new in shapes
    ]
    return sorted(made, key=lambda one: one.at_s)


def serve(requests: list[Request], budget: int | None, target_s: float) -> list[Request]:
    """Everything to its end; without a budget, chunks follow from the targets."""
    truth, coming = costs(), deque(enumerate(requests))
    scheduler = Scheduler(
        BlockPool(1024),
        step_tokens=budget or 512,
        max_sequences=32,
        costs=None if budget else costs(),
    )
    running: dict[int, Request] = {}
    now = 0.0
    while coming or running:
        if not running:
            now = max(now, coming[0][1].at_s)
        while coming and coming[0][1].at_s <= now:
            key, one = coming.popleft()
            running[key] = one
            ids = [10_000 * key + at for at in range(one.prompt)]
            sampling = Sampling(temperature=0, max_tokens=one.new)
            service = Service(tpot_s=target_s)
            scheduler.add(Sequence(key, ids, sampling, service, times=Times(one.at_s)))
        plan = scheduler.plan(now)
        now += truth.estimate(step_size(plan))
        for work in plan:
            sequence, catches_up = work.sequence, work.catches_up
            sequence.computed += work.count
            scheduler.seal(sequence)
            if not catches_up:
                continue
            sequence.tokens.append(2)
            sequence.times.last_token = now
            sequence.times.first_token = sequence.times.first_token or now
            running[sequence.key].left_s.append(now)
            if sequence.answer_tokens == sequence.sampling.max_tokens:
                scheduler.remove(sequence)
                del running[sequence.key]
    return requests


def span_s(served: list[Request]) -> float:
    return max(one.left_s[-1] for one in served) - served[0].at_s


@pytest.mark.parametrize("load", [0.4, 0.8])
@pytest.mark.parametrize("steps", [2.5, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_fixed_budget_is_much_faster_and_gaps_stay_short(seed, steps, load):
    """Throughput is within 5 % of the best budget's, with all gaps within three targets."""
    target_s = steps * costs().estimate(StepSize(8))
    fixed = [serve(arrivals(seed, load), budget, target_s) for budget in FIXED]
    ours = serve(arrivals(seed, load), None, target_s)
    assert span_s(ours) * 0.95 <= min(map(span_s, fixed))
    assert max(one.largest_gap_s for one in ours) <= 3 * target_s


def test_chats_do_not_wait_behind_long_prompts():
    """On average their first tokens come in half the time of any fixed budget, or sooner."""
    target_s = 3 * costs().estimate(StepSize(8))

    def chat_ttft_s(budget: int | None) -> float:
        served = [one for seed in range(8) for one in serve(arrivals(seed, 0.8), budget, target_s)]
        return fmean(one.ttft_s for one in served if one.new == 64)

    assert 2 * chat_ttft_s(None) <= min(map(chat_ttft_s, FIXED))
