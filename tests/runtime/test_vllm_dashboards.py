"""The dashboards that vLLM publishes, on a worker of ours: their series are there, by their labels.

Names are those of the queries in vLLM's repository, under examples/observability: Overview,
Instances, KV Cache and Speculative Decoding of dashboards/grafana (made by its
tools/generate_grafana_dashboards.py), performance_statistics.json and query_statistics.json beside
them, vllm_service_status.json, and prometheus_grafana/grafana.json; as of September 2026.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cache.tokens import Tokenizer
from spec_decode.prediction import Prediction
from tests.runtime.test_server import serving
from tests.runtime.test_speculation import always
from tests.runtime.tiny_models import FAMILIES, write_model

ENGINE = {"model_name", "engine"}
# Series of counters and gauges, with the labels that queries pick or group by.
NUMBERS: dict[str, set[str]] = {
    "vllm:num_requests_running": ENGINE,
    "vllm:num_requests_waiting": ENGINE,
    "vllm:num_requests_waiting_by_reason": ENGINE | {"reason"},
    "vllm:kv_cache_usage_perc": ENGINE,
    "vllm:engine_sleep_state": ENGINE | {"sleep_state"},
    "vllm:cache_config_info": {"engine", "num_gpu_blocks", "block_size", "enable_prefix_caching"},
    "vllm:num_preemptions_total": ENGINE,
    "vllm:prompt_tokens_total": ENGINE,
    "vllm:prompt_tokens_by_source_total": ENGINE | {"source"},
    "vllm:prompt_tokens_cached_total": ENGINE,
    "vllm:prompt_tokens_cached_by_source_total": ENGINE | {"source"},
    "vllm:generation_tokens_total": ENGINE,
    "vllm:prefix_cache_hits_total": ENGINE,
    "vllm:prefix_cache_queries_total": ENGINE,
    "vllm:external_prefix_cache_hits_total": ENGINE,
    "vllm:external_prefix_cache_queries_total": ENGINE,
    "vllm:request_success_total": ENGINE | {"finished_reason"},
    "vllm:spec_decode_num_drafts_total": ENGINE,
    "vllm:spec_decode_num_draft_tokens_total": ENGINE,
    "vllm:spec_decode_num_accepted_tokens_total": ENGINE,
    "vllm:spec_decode_num_accepted_tokens_per_pos_total": ENGINE | {"position"},
    "http_requests_total": {"status", "handler"},
    "process_cpu_seconds_total": set(),
    "process_max_fds": set(),
    "process_open_fds": set(),
    "process_resident_memory_bytes": set(),
    "process_start_time_seconds": set(),
}
HISTOGRAMS: dict[str, set[str]] = {
    "vllm:time_to_first_token_seconds": ENGINE,
    "vllm:inter_token_latency_seconds": ENGINE,
    "vllm:request_time_per_output_token_seconds": ENGINE,
    "vllm:e2e_request_latency_seconds": ENGINE,
    "vllm:request_queue_time_seconds": ENGINE,
    "vllm:request_prefill_time_seconds": ENGINE,
    "vllm:request_decode_time_seconds": ENGINE,
    "vllm:request_prompt_tokens": ENGINE,
    "vllm:request_generation_tokens": ENGINE,
    "vllm:request_max_num_generation_tokens": ENGINE,
    "vllm:request_prefill_kv_computed_tokens": ENGINE,
    "vllm:iteration_tokens_total": ENGINE,
    "http_request_duration_seconds": {"handler"},
}
# Values that queries ask for, and bounds that the Overview takes targets from.
VALUES = {
    ("vllm:num_requests_waiting_by_reason", "reason"): {"capacity", "deferred"},
    ("vllm:request_success_total", "finished_reason"): {"error", "stop", "length"},
    ("vllm:engine_sleep_state", "sleep_state"): {"awake", "discard_all"},
    ("vllm:prompt_tokens_by_source_total", "source"): {
        "local_compute", "local_cache_hit", "external_kv_transfer",
    },
    ("http_requests_total", "status"): {"2xx"},
    ("vllm:time_to_first_token_seconds_bucket", "le"): {
        "0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "10.0",
    },
    ("vllm:request_time_per_output_token_seconds_bucket", "le"): {
        "0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """Labels of all series by name, of a worker that has guessed and answered."""
    folder: Path = write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])
    letter = Tokenizer.load(folder).encode("x", special=False)[0]
    body = {"max_tokens": 24, "logit_bias": {str(letter): 100}}
    with serving(folder, speculation=always(Prediction())) as world:
        expected = {"type": "content", "content": 24 * "x"}
        assert world.post(**body, prediction=expected).status_code == 200
        world.until(world.idle)
        text = world.client.get("/metrics").text
    series: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series.setdefault(sample.name, []).append(sample.labels)
    return series


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_there_with_its_labels(
    page: dict[str, list[dict[str, str]]], name: str
) -> None:
    assert all(NUMBERS[name] <= labels.keys() for labels in page[name])


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_a_histogram_is_there_with_its_labels(
    page: dict[str, list[dict[str, str]]], name: str
) -> None:
    for part in ("bucket", "sum", "count"):
        assert all(HISTOGRAMS[name] <= labels.keys() for labels in page[f"{name}_{part}"])


@pytest.mark.parametrize(("name", "label"), VALUES)
def test_what_queries_pick_is_among_the_values(
    page: dict[str, list[dict[str, str]]], name: str, label: str
) -> None:
    assert VALUES[name, label] <= {labels[label] for labels in page[name]}
