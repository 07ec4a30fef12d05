"""The counters that our services tell at /metrics, by name, without the `_total` at the end.

What they mean and where their numbers stand says docs/metrics.md; here are names alone, for who
has to know whether there is one before any service runs. Tests hold them against the services'.
"""

from __future__ import annotations

WORKER = (
    "headgate_abandoned_tokens", "headgate_accepted_draft_tokens_at", "headgate_cache_hit_tokens",
    "headgate_cache_query_tokens", "headgate_draft_rest_steps", "headgate_draft_seconds",
    "headgate_draft_tokens", "headgate_drafts", "headgate_forward_seconds",
    "headgate_generation_tokens", "headgate_kv_events", "headgate_kv_evictions",
    "headgate_late_tokens", "headgate_preemptions", "headgate_prompt_tokens",
    "headgate_quantized_kv_steps", "headgate_quantized_weight_steps", "headgate_refused_requests",
    "headgate_requests", "headgate_steps", "headgate_target_requests",
    "headgate_tier_copy_seconds", "headgate_tier_failures", "headgate_tier_loaded_bytes",
    "headgate_tier_moved_blocks", "headgate_tier_stored_bytes", "headgate_token_ledger_requests",
    "headgate_token_ledger_tokens", "headgate_token_ledger_violations", "http_requests",
    "vllm:admission_rejections", "vllm:external_prefix_cache_hits",
    "vllm:external_prefix_cache_queries", "vllm:generation_tokens", "vllm:num_preemptions",
    "vllm:prefix_cache_hits", "vllm:prefix_cache_queries", "vllm:prompt_tokens",
    "vllm:prompt_tokens_by_source", "vllm:prompt_tokens_cached",
    "vllm:prompt_tokens_cached_by_source", "vllm:request_success",
    "vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_accepted_tokens_per_pos",
    "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_drafts",
)  # fmt: skip
GATEWAY = (
    "headgate_gateway_admitted", "headgate_gateway_bytes_after_cancel",
    "headgate_gateway_draft_tokens", "headgate_gateway_first_token_in_time",
    "headgate_gateway_first_token_late", "headgate_gateway_goodput_requests",
    "headgate_gateway_limited", "headgate_gateway_phase_seconds", "headgate_gateway_prompt_tokens",
    "headgate_gateway_queue_seconds", "headgate_gateway_records",
    "headgate_gateway_replica_attempts", "headgate_gateway_replica_requests",
    "headgate_gateway_requests",
    "headgate_gateway_response_cache_hits", "headgate_gateway_response_cache_misses",
    "headgate_gateway_shed", "headgate_gateway_stalls", "headgate_gateway_store_outages",
    "headgate_gateway_tokens_in_time", "headgate_gateway_tokens_late",
    "headgate_gateway_trace_spans", "headgate_gateway_trimmed_tokens",
    "headgate_gateway_uncached_prompt_tokens", "headgate_token_ledger_requests",
    "headgate_token_ledger_tokens", "headgate_token_ledger_violations", "process_cpu_seconds",
)  # fmt: skip
