"""Tokens: where prompts were cached, what was trimmed, guessed and counted."""

from __future__ import annotations

from gateway.metrics.family import PREFIX, Family, Reading, Values, by_name


def _rungs(r: Reading) -> Values:
    ladder = r.edge.ladder
    return by_name(
        {
            "prompt": ladder.prompt,
            "ideal": ladder.anywhere,
            "available": ladder.available,
            "captured": ladder.captured,
            "delivered": ladder.delivered,
        }
    )


def _missed(r: Reading) -> Values:
    ladder = r.edge.ladder
    return by_name({name: getattr(ladder, name) for name in ("unknown", "down", "load", "evicted")})


def _trimmed(r: Reading) -> Values:
    totals = r.edge.shortener.totals
    return by_name({"removed": totals.removed_tokens, "again": totals.again_tokens})


def _drafted(r: Reading) -> Values:
    stages = r.edge.meters.stages
    accepted = stages["accepted"]
    return by_name({"accepted": accepted, "rejected": stages["drafted"] - accepted})


COUNTERS = (
    Family(
        PREFIX + "prompt_tokens",
        "Prompt tokens, and how many of them were cached: somewhere, at a replica that could be "
        "chosen, at the one that was, and found there.",
        _rungs,
        ("rung",),
    ),
    Family(
        PREFIX + "uncached_prompt_tokens",
        "Why prompt tokens were not found in a cache.",
        _missed,
        ("cause",),
    ),
    Family(
        PREFIX + "trimmed_tokens",
        "Prompt tokens that trimming left out, and those that it made the replicas compute again.",
        _trimmed,
        ("what",),
    ),
    Family(
        PREFIX + "draft_tokens",
        "Guessed tokens by whether they were right, as far as answers tell.",
        _drafted,
        ("fate",),
    ),
    Family(
        "headgate_token_ledger_tokens",
        "Tokens of answers that came whole, by the stage of their way.",
        lambda r: by_name(r.edge.meters.stages),
        ("stage",),
    ),
    Family(
        "headgate_token_ledger_requests",
        "Requests whose counts were checked.",
        lambda r: r.edge.meters.checked,
    ),
    Family(
        "headgate_token_ledger_violations",
        "Requests whose counts do not add up, by what does not hold.",
        lambda r: by_name(r.edge.meters.violations),
        ("invariant",),
    ),
)
