"""How long the next step may take, by what running answers and waiting prompts are promised.

Knows sequences and their targets; knows no blocks, and nothing of what is computed in that time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Many

from runtime.sequence import Sequence

# How much longer than its target one token may take, when the answer is ahead of its targets or
# prompts would be late.
GAP_TARGETS = 2.0
# No step is planned to take longer, also where nothing runs: who comes or leaves waits for its end.
STEP_S_MAX = 0.5


def step_s(
    running: Many[Sequence],
    behind: Iterable[Sequence],
    now: float,
    *,
    decodes_s: float,
    tpot_s: float | None,
) -> float:
    """Seconds for a step that spends `decodes_s` on answers; `tpot_s` is the target of those
    without one. `behind` are those with more than a token to compute, first things first.

    An answer that is ahead of its targets lends that time, and every answer lets prompts of its
    class or a higher one have what they need to be in time: both up to a gap of `GAP_TARGETS`.
    """
    answers = [one for one in running if one.times.first_token is not None]
    highest = min((one.service.priority for one in answers), default=0)
    prompts = (one for one in behind if one.service.priority <= highest)
    pressed_s = _pressed_s(prompts, now, decodes_s) if answers else 0.0
    tightest = STEP_S_MAX
    for one in answers:
        target = one.service.tpot_s or tpot_s
        times = one.times
        if target is None or times.first_token is None or times.last_token is None:
            continue
        due = times.first_token + target * one.answer_tokens
        since = now - times.last_token
        most = max(due - now, target - since, pressed_s)
        tightest = min(tightest, most, GAP_TARGETS * target - since)
    return tightest


def _pressed_s(prompts: Iterable[Sequence], now: float, decodes_s: float) -> float:
    """How long steps must be so that these prompts, one after another, are done when due.

    The longer a step is, the larger is the share of it that decodes leave. What is needed is the
    share that work has of the time that is left, each prompt's together with all before it: the
    test of a schedule by earliest deadline.
    """
    work_s = share = 0.0
    for one in prompts:
        if one.times.first_token is not None:
            continue  # its answer has begun: it was preempted, and nothing is due
        work_s += one.alone_s * one.behind / (one.prompt_tokens - one.cached)
        left_s = one.due_s - now
        if left_s <= work_s:
            return STEP_S_MAX
        share = max(share, work_s / left_s)
    return decodes_s / (1.0 - share)
