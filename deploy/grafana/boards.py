"""The six dashboards: what is asked of the metrics of docs/metrics.md, and what to see in it.

Longer than files should be: it is one table, whose rows are read beside each other.
"""

from __future__ import annotations

from deploy.grafana.panels import Dashboard, Panel, Query, Row, Variable

_GOOD = "headgate_gateway_goodput_requests_total"
_TTFT = "gen_ai_server_time_to_first_token_seconds"
_TPOT = "gen_ai_server_time_per_output_token_seconds"
_UNREAD = "headgate_gateway_recv_queue_seconds"
_PROMPT = "headgate_gateway_prompt_tokens_total"
# What a reader chooses, as variables of the dashboard.
_TIER, _MODEL, _REPLICA = ('tier=~"$tier"', 'model=~"$model"', 'replica=~"$replica"')
_BOTH = f"{_TIER},{_MODEL}"


def share(part: str, whole: str, by: str = "") -> str:
    """A rate as a share of another one, by labels."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({part}[$W])) / sum{grouped} (rate({whole}[$W]))"


def rate(name: str, by: str = "", of: str = "") -> str:
    """`of`: matchers of what is chosen."""
    chosen = f"{{{of}}}" if of else ""
    return f"sum{f' by ({by})' if by else ''} (rate({name}{chosen}[$W]))"


def kept(by: str, of: str = "") -> str:
    """The share of answers that kept their targets; 1 where none has missed one yet."""
    whole = rate(_GOOD, by, of)
    missed = rate(_GOOD, by, ",".join(filter(None, ('met="false"', of))))
    return f"1 - ({missed} or 0 * {whole}) / {whole}"


def quantile(q: float, name: str, by: str = "", of: str = "") -> str:
    """Of a histogram, over all processes."""
    grouped = f"le, {by}" if by else "le"
    chosen = f"{{{of}}}" if of else ""
    return f"histogram_quantile({q}, sum by ({grouped}) (rate({name}_bucket{chosen}[$W])))"


def mean(name: str, by: str = "") -> str:
    return share(f"{name}_sum", f"{name}_count", by)


def by_replica(fold: str, name: str) -> str:
    return f"{fold} by (replica) ({name}{{{_REPLICA}}})"


SERVICE_LEVELS = Dashboard(
    "headgate-overview", "Headgate: service levels", "Tiers against what they promise.",
    [
        Row("Promises", [
            Panel(
                "Goodput", "Answers that kept every target of their tier. The objective is 99 %.",
                [Query(kept("tier", _TIER), "{{tier}}")],
                "percentunit", at_most=1,
            ),
            Panel(
                "Error budget burn", "1 misses exactly 1 % of the answers; 14.4 is an alert.",
                [Query(f"headgate:slo_missed:ratio_rate5m{{{_TIER}}} / 0.01", "{{tier}}, 5 min"),
                 Query(f"headgate:slo_missed:ratio_rate1h{{{_TIER}}} / 0.01", "{{tier}}, 1 h")],
                warns_at=14.4,
            ),
            Panel(
                "Answers by how they ended", "Of the tiers and models chosen, as what clients wait "
                "for below. Cancelled: the client left, which is no failure.",
                [Query(rate("headgate_gateway_requests_total", "outcome", _BOTH), "{{outcome}}")],
                "reqps", stacked=True,
            ),
        ]),
        Row("What clients wait for", [
            Panel(
                "Time to first token", "Queue included. A dot is a request: it leads to its trace.",
                [Query(quantile(0.5, _TTFT, "tier", _BOTH), "{{tier}} p50"),
                 Query(quantile(0.95, _TTFT, "tier", _BOTH), "{{tier}} p95", exemplars=True)],
                "s",
            ),
            Panel(
                "Time per output token", "Mean of a stream; the pace that a reader sees.",
                [Query(quantile(0.5, _TPOT, "tier", _BOTH), "{{tier}} p50"),
                 Query(quantile(0.95, _TPOT, "tier", _BOTH), "{{tier}} p95")],
                "s",
            ),
            Panel(
                "Longest gap of a stream", "What one long prefill chunk does to those that run.",
                [Query(quantile(0.95, "headgate_gateway_largest_gap_seconds", "tier", _BOTH),
                       "{{tier}} p95"),
                 Query(rate("headgate_gateway_stalls_total", "tier", _TIER),
                       "{{tier}} stalls a second")],
                "s",
            ),
        ]),
        Row("Queue", [
            Panel(
                "Requests", "Waiting ones are in the gateway, where they are ordered.",
                [Query(f"sum by (tier) (headgate_gateway_requests_waiting{{{_TIER}}})",
                       "{{tier}} waits"),
                 Query(f"sum by (tier) (headgate_gateway_requests_running{{{_TIER}}})",
                       "{{tier}} runs")],
                stacked=True,
            ),
            Panel(
                "Prompt tokens to compute", "What autoscalers go by: work that nobody has done.",
                [Query("sum by (where) (headgate_gateway_queued_uncached_tokens)", "{{where}}")],
                stacked=True,
            ),
            Panel(
                "Sent away", "Shed for saturation, limited by a tenant's own limits.",
                [Query(rate("headgate_gateway_shed_total", "tier", _TIER), "{{tier}} shed"),
                 Query(rate("headgate_gateway_limited_total", "tier", _TIER), "{{tier}} limited")],
                "reqps",
            ),
        ]),
    ],
    (Variable("tier", "headgate_gateway_requests_total"),
     Variable("model", "headgate_gateway_requests_total")),
)  # fmt: skip

WATERFALL = Dashboard(
    "headgate-waterfall", "Headgate: where the time goes", "Milliseconds by phase.",
    [
        Row("Requests, as the gateway sees them", [
            Panel(
                "Seconds by phase", "Of the tiers chosen, a second: what grows is what to mend.",
                [Query(rate("headgate_gateway_phase_seconds_total", "phase", _TIER), "{{phase}}")],
                "s", width=12, stacked=True,
            ),
            Panel(
                "Seconds of a mean request", "The same, by the requests of the tiers chosen.",
                [Query(
                    'sum by (phase) '
                    '(rate(headgate_gateway_phase_seconds_total{tier=~"$tier"}[$W]))'
                    ' / on () group_left () '
                    'sum(rate(headgate_gateway_requests_total{tier=~"$tier"}[$W]))',
                    "{{phase}}",
                )],
                "s", width=12, stacked=True,
            ),
            Panel(
                "Unread in the sockets", "Until a gateway's loop reads a request: it is busy, or "
                "waits for a core. A p95 above the line for ten minutes is an alert.",
                [Query(quantile(0.5, _UNREAD, "instance, process", _TIER),
                       "{{instance}} {{process}} p50"),
                 Query(quantile(0.95, _UNREAD, "instance, process", _TIER),
                       "{{instance}} {{process}} p95", exemplars=True)],
                "s", width=24, warns_at=0.1,
            ),
        ]),
        Row("Engines", [
            Panel(
                "Queue, prefill, decode", "p95 of our runtime's answers.",
                [Query(quantile(0.95, f"headgate_{part}_seconds"), part)
                 for part in ("queue", "prefill", "decode")],
                "s",
            ),
            Panel(
                "Steps", "Seconds of an engine's step, and tokens in it.",
                [Query(quantile(0.95, "headgate_step_seconds"), "p95"),
                 Query(mean("headgate_step_seconds"), "mean")],
                "s",
            ),
            Panel(
                "Tokens", "Computed prompts, answers.",
                [Query(rate("headgate_prompt_tokens_total"), "prompt"),
                 Query(rate("headgate_generation_tokens_total"), "answer")],
            ),
            Panel(
                "In the batch", "And what waits for a place in an engine, which should be little.",
                [Query("sum by (instance) (headgate_running_requests)", "{{instance}} runs"),
                 Query("sum by (reason) (headgate_waiting_requests)", "waits: {{reason}}")],
            ),
            Panel(
                "Inside the model", "Share of the steps' time; the rest is the engine's own.",
                [Query(share("headgate_forward_seconds_total", "headgate_step_seconds_sum",
                             "instance"), "{{instance}}")],
                "percentunit", at_most=1,
            ),
            Panel(
                "Preempted", "Answers that gave their place back: the pool is too small.",
                [Query(rate("headgate_preemptions_total", "instance"), "{{instance}}")],
            ),
        ]),
        Row("Processes", [
            Panel(
                "Processors", "How many each process keeps busy; a gateway's limit is one.",
                [Query("rate(process_cpu_seconds_total[$W])", "{{instance}} {{process}}")],
                width=12,
            ),
            Panel(
                "Memory", "Resident. What climbs for hours is a leak, or a cache without a bound.",
                [Query("process_resident_memory_bytes", "{{instance}} {{process}}")],
                "bytes", width=12,
            ),
        ]),
    ],
    (Variable("tier", "headgate_gateway_requests_total"),),
)  # fmt: skip

CACHE = Dashboard(
    "headgate-cache", "Headgate: cache and routing", "Prompt tokens that nobody had to compute.",
    [
        Row("Prefix cache", [
            Panel(
                "Hit ladder", "Ideal: somebody had it. Available: one that could be chosen. "
                "Captured: the chosen one. Delivered: it was there.",
                [Query(
                    f'sum by (rung) (rate({_PROMPT}{{rung!="prompt"}}[$W])) / on () '
                    f'group_left () sum(rate({_PROMPT}{{rung="prompt"}}[$W]))',
                    "{{rung}}",
                )],
                "percentunit", at_most=1, width=12,
            ),
            Panel(
                "Why not", "Prompt tokens that were not found, by cause.",
                [Query(rate("headgate_gateway_uncached_prompt_tokens_total", "cause"),
                       "{{cause}}")],
                width=12, stacked=True,
            ),
            Panel(
                "Trimming", "What it left out, and what engines computed again because of it.",
                [Query(rate("headgate_gateway_trimmed_tokens_total", "what"), "{{what}}")],
            ),
            Panel(
                "KV pool", "Share that running answers hold; blocks by state.",
                [Query("headgate_kv_usage_ratio", "{{instance}}")], "percentunit", at_most=1,
            ),
            Panel(
                "Tiers below it", "Tokens by where they were found.",
                [Query(rate("headgate_cache_hit_tokens_total", "tier"), "{{tier}}")], stacked=True,
            ),
        ]),
        Row("Routing", [
            Panel(
                "Requests by engine", "Uneven on purpose where prompts are cached.",
                [Query(by_replica("sum", "headgate_gateway_replica_in_flight"), "{{replica}}")],
                stacked=True,
            ),
            Panel(
                "Predictions", "Factor by which first tokens come other than foreseen; 1 is right.",
                [Query(by_replica("max", "headgate_gateway_ttft_prediction_error_ratio"),
                       "{{replica}}")],
                warns_at=2,
            ),
            Panel(
                "Prefill rate", "Prompt tokens a second, as learned from first tokens.",
                [Query(by_replica("avg", "headgate_gateway_replica_prefill_tokens_per_second"),
                       "{{replica}}")],
            ),
            Panel(
                "Engines", "1 while it takes requests.",
                [Query(by_replica("min", "headgate_gateway_replica_up"), "{{replica}}")],
                at_most=1,
            ),
            Panel(
                "Answers by engine", "",
                [Query(rate("headgate_gateway_replica_requests_total", "replica, outcome",
                            _REPLICA),
                       "{{replica}} {{outcome}}")],
                "reqps",
            ),
            Panel(
                "Attempts that were no answer",
                "Requests that an engine failed, refused or was late with, whoever answered then.",
                [Query(rate("headgate_gateway_replica_attempts_total", "replica, outcome",
                            _REPLICA + ', outcome=~"failed|refused|late"'),
                       "{{replica}} {{outcome}}")],
                "reqps",
            ),
            Panel(
                "Response cache", "Answers that were given again.",
                [Query(rate("headgate_gateway_response_cache_hits_total"), "given again"),
                 Query(rate("headgate_gateway_response_cache_misses_total"), "looked for in vain")],
                "reqps",
            ),
        ]),
    ],
    (Variable("replica", "headgate_gateway_replica_up"),),
)  # fmt: skip

SPECULATION = Dashboard(
    "headgate-speculation", "Headgate: speculation", "Guessed tokens: what they bring and cost.",
    [
        Row("Guesses", [
            Panel(
                "Accepted", "Share of guessed tokens that were right, by who guessed.",
                [Query(share('headgate_draft_tokens_total{fate="accepted"}',
                             "headgate_draft_tokens_total", "proposer"), "{{proposer}}")],
                "percentunit", at_most=1,
            ),
            Panel(
                "By position", "Share of drafts whose token at this place was right.",
                [Query("sum by (position) (rate(headgate_accepted_draft_tokens_at_total[$W])) "
                       "/ on () group_left () sum(rate(headgate_drafts_total[$W]))",
                       "{{position}}")],
                "percentunit", at_most=1,
            ),
            Panel(
                "Tokens a step", "What an answer gets for one pass through the model.",
                [Query("1 + sum(rate(vllm:spec_decode_num_accepted_tokens_total[$W])) "
                       "/ sum(rate(headgate_drafts_total[$W]))", "with a guess")],
            ),
            Panel(
                "In vain", "Guessed tokens a second that were computed for nothing.",
                [Query('sum by (proposer) (rate(headgate_draft_tokens_total{fate="rejected"}[$W]))',
                       "{{proposer}}")],
            ),
            Panel(
                "Time for guessing", "Seconds of an engine's thread a second.",
                [Query(rate("headgate_draft_seconds_total", "instance"), "{{instance}}")], "s",
            ),
            Panel(
                "Rests", "Steps without a look, because guessing did not pay before.",
                [Query(rate("headgate_draft_rest_steps_total", "instance"), "{{instance}}")],
            ),
        ]),
    ],
)  # fmt: skip

GATE = Dashboard(
    "headgate-gate", "Headgate: gate and rollouts", "What may be served, and what is being tried.",
    [
        Row("Optimizations", [
            Panel(
                "State", "on, off, stale or quarantined; headgate gate status says why.",
                [Query("max by (name, state) (headgate_optimization_state) == 1")],
                kind="table", width=12,
            ),
            Panel(
                "Verdicts expire in", "Then the optimization goes off.",
                [Query("min by (name) (headgate_verdict_valid_seconds)", "{{name}}")],
                "s", kind="bargauge", width=6,
            ),
            Panel(
                "Age of verdicts", "",
                [Query("max by (name) (headgate_verdict_age_seconds)", "{{name}}")],
                "s", kind="bargauge", width=6,
            ),
        ]),
        Row("Rollout", [
            Panel(
                "Share of the candidate", "0 at once where it does harm.",
                [Query("max by (name) (headgate_rollout_share)", "{{name}}"),
                 Query("max by (name) (headgate_rollout_shadow_share)", "{{name}}, shadow")],
                "percentunit", at_most=1,
            ),
            Panel(
                "State of the rollout", "Suspended: the store is away. Lapsed: its lease ran out.",
                [Query("max by (name, state) (headgate_rollout_state) == 1")], kind="table",
            ),
            Panel(
                "Answers by arm", "",
                [Query(rate("headgate_gateway_requests_total", "arm, outcome"),
                       "{{arm}} {{outcome}}")],
                "reqps",
            ),
            Panel(
                "Time to first token by arm", "",
                [Query(quantile(0.5, _TTFT, "arm"), "{{arm}} p50"),
                 Query(quantile(0.95, _TTFT, "arm"), "{{arm}} p95")],
                "s",
            ),
            Panel(
                "Time per output token by arm", "",
                [Query(quantile(0.5, _TPOT, "arm"), "{{arm}} p50"),
                 Query(quantile(0.95, _TPOT, "arm"), "{{arm}} p95")],
                "s",
            ),
            Panel(
                "Goodput by arm", "",
                [Query(kept("arm"), "{{arm}}")],
                "percentunit", at_most=1,
            ),
        ]),
    ],
)  # fmt: skip

LEDGER = Dashboard(
    "headgate-ledger", "Headgate: token ledger", "What became of every token.",
    [
        Row("Tokens", [
            Panel(
                "By stage", "Of answers that came whole.",
                [Query(rate("headgate_token_ledger_tokens_total", "stage"), "{{stage}}")], width=12,
            ),
            Panel(
                "Counts that do not agree", "Anything here is a bug; the gateway's log has it.",
                [Query("sum by (invariant) (increase(headgate_token_ledger_violations_total[$W]))",
                       "{{invariant}}")],
                width=12, warns_at=1,
            ),
            Panel(
                "After clients left", "Bytes that engines still sent.",
                [Query(rate("headgate_gateway_bytes_after_cancel_total"), "bytes")], "Bps",
            ),
            Panel(
                "Recorder", "Requests by what became of them.",
                [Query(rate("headgate_gateway_records_total", "outcome"), "{{outcome}}")], "reqps",
            ),
            Panel(
                "Shared store", "1 while it answers.",
                [Query("min by (instance) (headgate_gateway_store_up)", "{{instance}}"),
                 Query(rate("headgate_gateway_store_outages_total"), "outages a second")],
            ),
        ]),
    ],
)  # fmt: skip

BOARDS = (SERVICE_LEVELS, WATERFALL, CACHE, SPECULATION, GATE, LEDGER)
