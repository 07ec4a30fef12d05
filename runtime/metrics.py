"""Every metric: its names, vLLM's and ours, what it means and where its number stands.

Knows no exposition. Labels are few, and none of them is a user, a session or a prompt.
docs/metrics.md describes every metric; the file is long because it is a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from runtime.distribution import Distribution

if TYPE_CHECKING:
    from cache.tiers import TierCounts
    from runtime.account import Load
    from runtime.speculation import Counts
    from runtime.swap import SwapCounts
    from runtime.tally import Tally

Value = float | Distribution
Values = Value | Mapping[tuple[str, ...], Value]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a page is made of, at one moment."""

    tally: Tally
    load: Load
    steps: int
    events: Mapping[str, int]
    tiers: Mapping[str, TierCounts]
    swap: SwapCounts | None
    cache: Mapping[str, str]
    facts: Mapping[str, str]
    guesses: Counts | None = None
    quantized: Mapping[str, bool] = field(default_factory=dict)  # `weights`, `kv`: by what is held
    late_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Family:
    """One metric under each of its names; a value, or values by what its own labels are."""

    names: tuple[str, ...]
    text: str
    read: Callable[[Reading], Values]
    labels: tuple[str, ...] = ()


def _by(values: Mapping[str, float]) -> Values:
    return {(name,): value for name, value in values.items()}


def _waiting_as_vllm(r: Reading) -> Values:
    """vLLM has two words: for room, and for blocks that somebody else will have."""
    waiting = r.load.waiting_for
    room = waiting["capacity"] + waiting["preempted"]
    return _by({"capacity": room, "deferred": waiting["prefix"] + waiting["tier"]})


def _finished_as_vllm(r: Reading) -> Values:
    """vLLM has no deadlines: an answer that missed its own was aborted."""
    counts = Counter(r.tally.finished)
    counts["abort"] += counts.pop("deadline")
    return _by(counts)


def _sources(r: Reading) -> Values:
    pool, lower = r.load.hit_tokens["pool"], _from_tiers(r)
    computed = r.load.asked_tokens - pool - lower
    return _by({"local_compute": computed, "local_cache_hit": pool, "external_kv_transfer": lower})


def _cached_sources(r: Reading) -> Values:
    hits = r.load.hit_tokens
    return _by({"device": hits["pool"], "host": hits["host"], "disk": hits["disk"]})


def _cached(r: Reading) -> int:
    return sum(r.load.hit_tokens.values())


def _from_tiers(r: Reading) -> int:
    return r.load.hit_tokens["host"] + r.load.hit_tokens["disk"]


def _tiers(read: Callable[[TierCounts], float]) -> Callable[[Reading], Values]:
    """A value of every tier; none where the policy has none."""
    return lambda r: {(name,): read(counts) for name, counts in r.tiers.items()}


def _tier_blocks(r: Reading) -> Values:
    whats = ("stored", "loaded", "evicted", "dropped", "forgotten", "corrupt")
    return {
        (name, what): getattr(counts, what) for name, counts in r.tiers.items() for what in whats
    }


def _copy_seconds(r: Reading) -> Values:
    return _by({"out": r.swap.read_s, "in": r.swap.write_s} if r.swap else {})


def _guessed(read: Callable[[Counts], Values]) -> Callable[[Reading], Values]:
    """A value of speculative decoding; none where nothing is ever guessed."""
    return lambda r: {} if r.guesses is None else read(r.guesses)


def _quantized(what: str) -> Callable[[Reading], Values]:
    """Every step runs through every layer, and writes to every layer's part of the pool."""
    return lambda r: r.steps if r.quantized.get(what) else 0


def _by_place(counts: Counts) -> Values:
    return {(str(at),): number for at, number in enumerate(counts.accepted_at)}


def _by_proposer(counts: Counts) -> Values:
    return {labels: float(tokens) for labels, tokens in list(counts.by_proposer.items())}


def _usage(r: Reading) -> Values:
    return r.load.blocks.in_use / r.load.blocks.total


def _blocks(r: Reading) -> Values:
    blocks = r.load.blocks
    return _by({"free": blocks.free, "cached": blocks.cached, "in_use": blocks.in_use})


def _info(labels: Mapping[str, str]) -> Values:
    return {tuple(labels.values()): 1}


GAUGES = (
    Family(
        ("vllm:num_requests_running", "headgate_running_requests"),
        "Answers in the batch.",
        lambda r: r.load.running,
    ),
    Family(
        ("vllm:num_requests_waiting",),
        "Answers that wait for a place in the batch.",
        lambda r: r.load.waiting,
    ),
    Family(
        ("vllm:num_requests_waiting_by_reason",),
        "Answers that wait for room (capacity), or for blocks that are on their way (deferred).",
        _waiting_as_vllm,
        ("reason",),
    ),
    Family(
        ("headgate_waiting_requests",),
        "Answers that wait for room, a prefix that another one computes, a tier, or to go on.",
        lambda r: _by(r.load.waiting_for),
        ("reason",),
    ),
    Family(
        ("vllm:kv_cache_usage_perc", "headgate_kv_usage_ratio"),
        "Share of the KV pool's blocks that running answers hold, 0 to 1.",
        _usage,
    ),
    Family(
        ("headgate_kv_blocks",),
        "Blocks of the KV pool by state; cached ones can be found and taken.",
        _blocks,
        ("state",),
    ),
    Family(
        ("headgate_tier_blocks",),
        "Blocks that a tier below the pool holds; like all of tiers, absent where there are none.",
        _tiers(lambda tier: tier.blocks),
        ("tier",),
    ),
    Family(
        ("headgate_tier_bytes",),
        "Bytes that a tier holds.",
        _tiers(lambda tier: tier.bytes),
        ("tier",),
    ),
    Family(
        ("headgate_tier_limit_bytes",),
        "Bytes that a tier may hold.",
        _tiers(lambda tier: tier.limit_bytes),
        ("tier",),
    ),
    Family(
        ("headgate_tier_on",),
        "0 once a tier has been switched off, by a full disk perhaps.",
        _tiers(lambda tier: tier.on),
        ("tier",),
    ),
    Family(
        ("vllm:engine_sleep_state",),
        "1 for awake: a worker never sleeps, and vLLM's boards take one that does not say so to be "
        "down.",
        lambda _: _by({"awake": 1, "weights_offloaded": 0, "discard_all": 0}),
        ("sleep_state",),
    ),
    Family(
        ("vllm:cache_config_info",),
        "1, with the KV pool's configuration as labels.",
        lambda r: _info(r.cache),
        ("block_size", "num_gpu_blocks", "enable_prefix_caching"),
    ),
    Family(
        ("headgate_worker_info",),
        "1, with what is served as labels.",
        lambda r: _info(r.facts),
        ("version", "system_fingerprint", "device", "dtype"),
    ),
)

COUNTERS = (
    Family(
        ("vllm:num_preemptions", "headgate_preemptions"),
        "Times that a running answer had to give its place or its blocks back.",
        lambda r: r.load.preemptions,
    ),
    Family(
        ("vllm:prompt_tokens", "headgate_prompt_tokens"),
        "Prompt tokens of answers that got a place in the batch, cached ones too.",
        lambda r: r.load.asked_tokens,
    ),
    Family(
        ("vllm:prompt_tokens_by_source",),
        "Prompt tokens: computed, found in the pool, or loaded from a tier.",
        _sources,
        ("source",),
    ),
    Family(
        ("vllm:prompt_tokens_cached",),
        "Prompt tokens that were found or loaded instead of computed.",
        _cached,
    ),
    Family(
        ("vllm:prompt_tokens_cached_by_source",),
        "The same by where they were.",
        _cached_sources,
        ("source",),
    ),
    Family(
        ("headgate_cache_hit_tokens",),
        "The same, with our names of the tiers.",
        lambda r: _by(r.load.hit_tokens),
        ("tier",),
    ),
    Family(
        ("vllm:generation_tokens", "headgate_generation_tokens"),
        "Tokens of answers.",
        lambda r: r.tally.sampled_tokens,
    ),
    Family(
        ("vllm:prefix_cache_queries", "headgate_cache_query_tokens"),
        "Prompt tokens that were looked for in the pool.",
        lambda r: r.load.asked_tokens,
    ),
    Family(
        ("vllm:prefix_cache_hits",),
        "Of these, tokens that were found.",
        lambda r: r.load.hit_tokens["pool"],
    ),
    Family(
        ("vllm:external_prefix_cache_queries",),
        "Prompt tokens that the pool did not have, and that were looked for in the tiers.",
        lambda r: r.load.asked_tokens - r.load.hit_tokens["pool"],
    ),
    Family(
        ("vllm:external_prefix_cache_hits",),
        "Of these, tokens that were loaded.",
        _from_tiers,
    ),
    Family(
        ("vllm:request_success",),
        "Answers that ended, by how.",
        _finished_as_vllm,
        ("finished_reason",),
    ),
    Family(
        ("headgate_requests",),
        "Answers that ended, by how; a deadline apart.",
        lambda r: _by(r.tally.finished),
        ("finished_reason",),
    ),
    Family(
        ("headgate_abandoned_tokens",),
        "Tokens of answers that did not come whole, by why.",
        lambda r: _by(r.tally.abandoned),
        ("reason",),
    ),
    Family(
        ("headgate_late_tokens",),
        "Tokens that were made for clients that had left, until the engine heard of it.",
        lambda r: r.late_tokens,
    ),
    Family(
        ("headgate_token_ledger_tokens",),
        "Tokens of answers that came whole, by the stage of their way.",
        lambda r: _by(r.tally.stages),
        ("stage",),
    ),
    Family(
        ("headgate_token_ledger_requests",),
        "Answers whose counts were checked.",
        lambda r: r.tally.checked,
    ),
    Family(
        ("headgate_token_ledger_violations",),
        "Answers whose counts do not add up, by what does not hold.",
        lambda r: _by(r.tally.violations),
        ("invariant",),
    ),
    Family(
        ("http_requests",),
        "Requests for answers by the path, and by the class of the status that they got.",
        lambda r: r.tally.http,
        ("handler", "method", "status"),
    ),
    Family(
        ("headgate_refused_requests",),
        "Requests that found the queue full.",
        lambda r: r.load.refused,
    ),
    Family(
        ("vllm:admission_rejections",),
        "The same by the limit.",
        lambda r: _by({"max_num_queued_reqs": r.load.refused}),
        ("reason",),
    ),
    Family(
        ("headgate_target_requests",),
        "Answers that named a target for their first token or for the mean of the others.",
        lambda r: r.tally.targets,
        ("target", "met"),
    ),
    Family(
        ("headgate_kv_evictions",),
        "Cached blocks that were given up for room.",
        lambda r: r.load.evictions,
    ),
    Family(
        ("headgate_tier_moved_blocks",),
        "Blocks that came and went, by tier and by what became of them.",
        _tier_blocks,
        ("tier", "what"),
    ),
    Family(
        ("headgate_tier_stored_bytes",),
        "Bytes that were stored in a tier.",
        _tiers(lambda tier: tier.stored_bytes),
        ("tier",),
    ),
    Family(
        ("headgate_tier_loaded_bytes",),
        "Bytes that a tier handed on upwards.",
        _tiers(lambda tier: tier.loaded_bytes),
        ("tier",),
    ),
    Family(
        ("headgate_tier_failures",),
        "Reads and writes of a tier that the operating system refused.",
        _tiers(lambda tier: tier.failed),
        ("tier",),
    ),
    Family(
        ("headgate_tier_copy_seconds",),
        "Time of the engine's thread for copies out of the pool and into it.",
        _copy_seconds,
        ("way",),
    ),
    Family(("headgate_steps",), "Steps of the engine.", lambda r: r.steps),
    Family(
        ("headgate_quantized_weight_steps",),
        "Steps that ran through layers with weights in eight bits or fewer.",
        _quantized("weights"),
    ),
    Family(
        ("headgate_quantized_kv_steps",),
        "Steps that kept keys and values in eight bits.",
        _quantized("kv"),
    ),
    Family(
        ("vllm:spec_decode_num_drafts", "headgate_drafts"),
        "Times that tokens were guessed for an answer; like all of guesses, absent where they are "
        "off.",
        _guessed(lambda counts: counts.drafts),
    ),
    Family(
        ("vllm:spec_decode_num_draft_tokens",),
        "Tokens that were guessed.",
        _guessed(lambda counts: counts.guessed),
    ),
    Family(
        ("vllm:spec_decode_num_accepted_tokens",),
        "Of these, tokens that were right and said; the others were computed in vain.",
        _guessed(lambda counts: counts.accepted),
    ),
    Family(
        ("vllm:spec_decode_num_accepted_tokens_per_pos", "headgate_accepted_draft_tokens_at"),
        "The accepted ones by their place in what was guessed, from 0.",
        _guessed(_by_place),
        ("position",),
    ),
    Family(
        ("headgate_draft_tokens",),
        "Guessed tokens by who guessed them, and whether they became tokens of an answer.",
        _guessed(_by_proposer),
        ("proposer", "fate"),
    ),
    Family(
        ("headgate_draft_seconds",),
        "Time of the engine's thread for guessing, the draft's forward passes included.",
        _guessed(lambda counts: counts.seconds),
    ),
    Family(
        ("headgate_draft_rest_steps",),
        "Steps in which nothing was looked at, because guessing did not pay before.",
        _guessed(lambda counts: counts.rested),
    ),
    Family(
        ("headgate_forward_seconds",),
        "Seconds inside the model; the rest of the steps' time is the engine's own.",
        lambda r: r.tally.forward_s,
    ),
    Family(
        ("headgate_kv_events",),
        "Block events: what was sent and what went wrong; absent where they are off.",
        lambda r: _by(r.events),
        ("what",),
    ),
)

HISTOGRAMS = (
    Family(
        ("vllm:time_to_first_token_seconds", "headgate_time_to_first_token_seconds"),
        "From a request's arrival to an answer's first token.",
        lambda r: r.tally.first_token_s,
    ),
    Family(
        ("vllm:inter_token_latency_seconds", "headgate_inter_token_seconds"),
        "Between two tokens of an answer.",
        lambda r: r.tally.token_s,
    ),
    Family(
        (
            "vllm:request_time_per_output_token_seconds",
            "headgate_time_per_output_token_seconds",
        ),
        "Mean time between an answer's tokens.",
        lambda r: r.tally.mean_token_s,
    ),
    Family(
        ("vllm:e2e_request_latency_seconds", "headgate_request_seconds"),
        "From arrival to the end.",
        lambda r: r.tally.whole_s,
    ),
    Family(
        ("vllm:request_queue_time_seconds", "headgate_queue_seconds"),
        "From arrival to the first place in the batch.",
        lambda r: r.tally.queue_s,
    ),
    Family(
        ("vllm:request_inference_time_seconds", "headgate_run_seconds"),
        "From the first place in the batch to the last token.",
        lambda r: r.tally.run_s,
    ),
    Family(
        ("vllm:request_prefill_time_seconds", "headgate_prefill_seconds"),
        "From the first place in the batch to the first token.",
        lambda r: r.tally.prefill_s,
    ),
    Family(
        ("vllm:request_decode_time_seconds", "headgate_decode_seconds"),
        "From the first token to the last.",
        lambda r: r.tally.decode_s,
    ),
    Family(
        ("vllm:request_prompt_tokens", "headgate_request_prompt_tokens"),
        "Tokens of a prompt.",
        lambda r: r.tally.prompt_tokens,
    ),
    Family(
        ("vllm:request_prefill_kv_computed_tokens", "headgate_request_computed_tokens"),
        "Tokens of a prompt that had to be computed.",
        lambda r: r.tally.computed_tokens,
    ),
    Family(
        ("vllm:request_generation_tokens", "headgate_request_generation_tokens"),
        "Tokens of an answer.",
        lambda r: r.tally.answer_tokens,
    ),
    Family(
        (
            "vllm:request_params_max_tokens",
            "vllm:request_max_num_generation_tokens",
            "headgate_request_max_tokens",
        ),
        "Longest answer that was allowed.",
        lambda r: r.tally.max_tokens,
    ),
    Family(
        ("vllm:request_num_preemptions", "headgate_request_preemptions"),
        "Times that an answer was preempted.",
        lambda r: r.tally.preemptions,
    ),
    Family(
        ("vllm:request_params_n", "headgate_request_choices"),
        "Answers to each prompt that a request wanted.",
        lambda r: r.tally.choices,
    ),
    Family(
        ("vllm:iteration_tokens_total", "headgate_step_tokens"),
        "Tokens that a step computed.",
        lambda r: r.tally.step_tokens,
    ),
    Family(("headgate_step_seconds",), "Time of a step.", lambda r: r.tally.step_s),
    Family(
        ("http_request_duration_seconds",),
        "From a request for answers to the end of what it got.",
        lambda r: r.tally.http_s,
        ("handler",),
    ),
)

FAMILIES: Mapping[Callable[..., Metric], tuple[Family, ...]] = {
    GaugeMetricFamily: GAUGES,
    CounterMetricFamily: COUNTERS,
    HistogramMetricFamily: HISTOGRAMS,
}
