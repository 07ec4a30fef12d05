"""Metrics: every one that is documented is on the page, under its names, and moves as it says."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cache.disk import DiskTier
from cache.slot_file import slot_bytes
from cache.tiers import MemoryTier, Tiers
from policies.schema import Weights
from runtime.distribution import FIRST_TOKEN_S, REQUEST_S, TOKEN_S, Distribution, tokens_up_to
from runtime.metrics import FAMILIES, HISTOGRAMS
from runtime.model import Model
from tests.runtime.test_server import CHAT, HELLO, World, serving
from tests.runtime.tiny_models import FAMILIES as MODELS, write_model

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
COMMON = {"model_name", "engine"}
# What dashboards, autoscalers and load generators ask vLLM 0.32 for.
OF_VLLM = (
    "num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason",
    "kv_cache_usage_perc", "cache_config_info", "num_preemptions_total", "prompt_tokens_total",
    "prompt_tokens_by_source_total", "prompt_tokens_cached_total",
    "prompt_tokens_cached_by_source_total",
    "external_prefix_cache_queries_total", "external_prefix_cache_hits_total",
    "admission_rejections_total", "request_num_preemptions", "generation_tokens_total",
    "prefix_cache_queries_total", "prefix_cache_hits_total", "request_success_total",
    "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_inference_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens",
    "request_max_num_generation_tokens", "request_params_max_tokens", "request_params_n",
    "request_prefill_kv_computed_tokens", "iteration_tokens_total",
)  # fmt: skip  # one short list


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), *MODELS["llama"])


def scrape(world: World) -> dict[str, Metric]:
    response = world.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def samples(world: World) -> dict[str, float]:
    """Value by name and own labels: `headgate_requests_total stop`; buckets left out."""
    found = {}
    for family in scrape(world).values():
        for sample in family.samples:
            if "le" not in sample.labels:
                own = [value for name, value in sample.labels.items() if name not in COMMON]
                found[" ".join([sample.name, *own])] = sample.value
    return found


def ours(families: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: one for name, one in families.items() if not name.startswith("process_")}


# ---- names --------------------------------------------------------------------------------------


def test_what_is_documented_is_on_the_page_and_nothing_else(folder: Path) -> None:
    """docs/metrics.md against a live scrape: names, labels, kinds, meaning."""
    text = PAGE.read_text()
    tables = {title: text.split(f"### {title}\n\n")[1].split("\n\n")[0] for title in KINDS}
    with serving(folder) as world:
        live = ours(scrape(world))
    documented = set()
    for title, kind in KINDS.items():
        for line in tables[title].splitlines()[2:]:
            names, labels, meaning = (cell.strip() for cell in line.strip("|").split(" | "))
            for name in re.findall("`([^`]+)`", names):
                documented.add(name.removesuffix("_total") if kind == "counter" else name)
                family = live[name.removesuffix("_total") if kind == "counter" else name]
                assert family.type == kind
                assert family.documentation == meaning
                for sample in family.samples:
                    own = sample.labels.keys() - COMMON - {"le"}
                    assert own == set(re.findall("`([^`]+)`", labels)), name
                    assert sample.labels.keys() >= COMMON
    assert documented == live.keys()


KINDS = {"Gauges": "gauge", "Counters": "counter", "Histograms": "histogram"}


def test_the_names_that_scrapers_of_vllm_ask_for_are_there(folder: Path) -> None:
    with serving(folder) as world:
        text = world.client.get("/metrics").text
    for name in OF_VLLM:
        assert re.search(rf"^vllm:{name}(_bucket|_sum|_count)?\{{", text, re.MULTILINE), name


def test_bounds_are_those_of_vllm_and_finer_ones() -> None:
    """A query for le="0.3" finds it; below, where vLLM has one bucket, there are eleven."""
    whole = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920]
    first = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
    token = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20]
    assert set(whole) <= set(REQUEST_S)
    assert set(first) <= set(FIRST_TOKEN_S)
    assert set(token) <= set(TOKEN_S)
    assert bisect_left(REQUEST_S, 0.3) + 1 == 11
    assert tokens_up_to(2048) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    for bounds in (REQUEST_S, FIRST_TOKEN_S, TOKEN_S):
        assert list(bounds) == sorted(set(bounds))


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), max_size=30),
    st.sets(st.integers(0, 12), min_size=1).map(sorted),
)
def test_a_distribution_counts_what_is_at_most_each_bound(
    values: list[tuple[int, int]], bounds: list[int]
) -> None:
    """A value on a bound belongs to it, as Prometheus has it."""
    made = Distribution(bounds)
    for value, times in values:
        made.observe(value, times)
    counts, total = made.read()
    everything = [value for value, times in values for _ in range(times)]
    for bound, (name, count) in zip(bounds, counts, strict=False):
        assert (float(name), count) == (bound, sum(value <= bound for value in everything))
    assert counts[-1] == ("+Inf", len(everything))
    assert total == sum(everything)


# ---- what moves them ----------------------------------------------------------------------------


EIGHT = Weights(attention="w8a8", mlp="w8a8", head="w8a8")


@pytest.mark.parametrize(
    ("formats", "rounds"),
    [
        ({}, {"weight": False, "kv": False}),
        ({"weights": EIGHT}, {"weight": True, "kv": False}),
        ({"kv": "int8"}, {"weight": False, "kv": True}),
    ],
    ids=["plain", "w8a8", "kv int8"],
)
def test_steps_through_what_is_quantized_are_counted(
    folder: Path, formats: dict[str, Any], rounds: dict[str, bool]
) -> None:
    """By what the model holds: a format that was asked for and not taken counts nothing."""
    with serving(folder, formats=formats) as world:
        assert world.post(max_tokens=5).status_code == 200
        world.until(world.idle)
        after = samples(world)
    for what, rounded in rounds.items():
        told = after[f"headgate_quantized_{what}_steps_total"]
        assert told == (after["headgate_steps_total"] if rounded else 0), what


def test_a_request_moves_what_it_should_and_agrees_with_its_usage(folder: Path) -> None:
    """Three requests, the last one for two answers: tokens, counts of histograms, ends."""
    with serving(folder) as world:
        before = samples(world)
        usages = [world.post(max_tokens=5).json()["usage"] for _ in range(2)]
        usages.append(world.post(max_tokens=7, n=2).json()["usage"])
        world.until(world.idle)
        after = samples(world)
    moved = {name: value - before[name] for name, value in after.items() if value != before[name]}
    answers, prompt = 4, usages[0]["prompt_tokens"]
    generated = sum(usage["completion_tokens"] for usage in usages)
    for name in ("vllm:generation_tokens_total", "headgate_generation_tokens_total"):
        assert moved[name] == generated == 24
    assert moved["vllm:prompt_tokens_total"] == answers * prompt
    assert (
        moved["vllm:request_success_total length"] == moved["headgate_requests_total length"] == 4
    )
    assert moved["vllm:request_params_n_count"] == len(usages)
    assert moved[f"http_requests_total {CHAT} POST 2xx"] == len(usages)
    assert moved["vllm:request_params_n_sum"] == 1 + 1 + 2
    once_an_answer = [
        name
        for family in HISTOGRAMS
        for name in family.names
        if name not in (*PER_REQUEST, *PER_STEP, *PER_TOKEN)
    ]
    assert len(once_an_answer) == 25
    assert {moved[f"{name}_count"] for name in once_an_answer} == {answers}
    for name in PER_TOKEN:
        assert moved[f"{name}_count"] == generated - answers
    assert moved["vllm:request_generation_tokens_sum"] == generated
    assert moved["vllm:request_params_max_tokens_sum"] == 5 + 5 + 7 + 7
    assert moved["vllm:iteration_tokens_total_count"] == moved["headgate_steps_total"]
    assert moved["headgate_step_seconds_sum"] >= moved["headgate_forward_seconds_total"] > 0
    parts = moved["headgate_queue_seconds_sum"] + moved["headgate_run_seconds_sum"]
    assert 0 < parts <= moved["headgate_request_seconds_sum"]
    assert moved["headgate_prefill_seconds_sum"] + moved["headgate_decode_seconds_sum"] == (
        pytest.approx(moved["headgate_run_seconds_sum"])
    )


PER_REQUEST = (
    "vllm:request_params_n", "headgate_request_choices", "http_request_duration_seconds",
)  # fmt: skip
PER_STEP = ("vllm:iteration_tokens_total", "headgate_step_tokens", "headgate_step_seconds")
PER_TOKEN = ("vllm:inter_token_latency_seconds", "headgate_inter_token_seconds")


def test_cached_tokens_are_those_of_the_usage(folder: Path) -> None:
    """The same prompt again: found tokens, computed ones, and queries add up under every name."""
    with serving(folder) as world:
        asked = {"messages": [{"role": "user", "content": "x" * 100}]}
        usages = [world.post(**asked).json()["usage"] for _ in range(2)]
        world.until(world.idle)
        now = samples(world)
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == [0, 96]
    prompts = sum(usage["prompt_tokens"] for usage in usages)
    for name in (
        "vllm:prefix_cache_hits_total",
        "vllm:prompt_tokens_cached_total",
        "vllm:prompt_tokens_by_source_total local_cache_hit",
        "vllm:prompt_tokens_cached_by_source_total device",
        "headgate_cache_hit_tokens_total pool",
    ):
        assert now[name] == 96
    assert now["vllm:prompt_tokens_by_source_total local_compute"] == prompts - 96
    assert now["vllm:prefix_cache_queries_total"] == prompts
    assert now["headgate_request_computed_tokens_sum"] == prompts - 96
    assert now["headgate_kv_blocks cached"] > 5


def test_hits_are_told_by_tier(folder: Path, tmp_path: Path) -> None:
    """Prompts of 25 blocks, a pool of 64, memory for 40: they come back from all three tiers."""

    def below(model: Model) -> Tiers:
        disk = DiskTier(
            tmp_path / "tier",
            limit_bytes=200 * slot_bytes(model.block_bytes),
            block_bytes=model.block_bytes,
            identity={"model": "tiny"},
        )
        return Tiers(MemoryTier(40 * model.block_bytes), disk)

    with serving(folder, below=below) as world:
        prompts = [{"messages": [{"role": "user", "content": one * 400}]} for one in "abcdef"]
        again = [prompts[at] for at in (5, 2, 0)]
        usages = [world.post(**asked).json()["usage"] for asked in prompts + again]
        world.until(world.idle)
        now = samples(world)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    by_tier = {name: now[f"headgate_cache_hit_tokens_total {name}"] for name in TIERS}
    assert sum(by_tier.values()) == cached == now["vllm:prompt_tokens_cached_total"]
    assert all(by_tier.values())
    assert now["vllm:prompt_tokens_cached_by_source_total disk"] == by_tier["disk"]
    lower = by_tier["host"] + by_tier["disk"]
    assert now["vllm:external_prefix_cache_hits_total"] == lower
    assert now["vllm:prompt_tokens_by_source_total external_kv_transfer"] == lower
    assert now["vllm:prefix_cache_hits_total"] == by_tier["pool"]
    asked = sum(usage["prompt_tokens"] for usage in usages)
    sources = [value for name, value in now.items() if name.startswith(BY_SOURCE)]
    assert sum(sources) == now["vllm:prompt_tokens_total"] == asked
    for name in ("host", "disk"):
        assert now[f"headgate_tier_blocks {name}"] > 0
        assert 0 < now[f"headgate_tier_bytes {name}"] <= now[f"headgate_tier_limit_bytes {name}"]
        assert now[f"headgate_tier_on {name}"] == 1
        assert now[f"headgate_tier_moved_blocks_total {name} loaded"] > 0
        assert now[f"headgate_tier_failures_total {name}"] == 0
    assert now["headgate_tier_copy_seconds_total in"] > 0


TIERS = ("pool", "host", "disk")
BY_SOURCE = "vllm:prompt_tokens_by_source_total"


def test_who_runs_who_waits_and_who_was_refused(folder: Path) -> None:
    """One place in the batch, two in the queue: gauges say so while it is so."""
    with serving(folder, max_waiting=2, max_sequences=1) as world, ThreadPoolExecutor(4) as pool:
        world.model.gate.clear()
        running = pool.submit(world.post)
        world.until(lambda: world.health()["running"] == 1)
        waiting = [pool.submit(world.post) for _ in range(2)]
        world.until(lambda: world.health()["waiting"] == 2)
        assert world.post().status_code == 503
        now = samples(world)
        assert now["vllm:num_requests_running"] == now["headgate_running_requests"] == 1
        assert now["vllm:num_requests_waiting"] == 2
        assert now["vllm:num_requests_waiting_by_reason capacity"] == 2
        assert now["headgate_waiting_requests capacity"] == 2
        assert now["headgate_refused_requests_total"] == 1
        assert now["vllm:admission_rejections_total max_num_queued_reqs"] == 1
        assert 0 < now["vllm:kv_cache_usage_perc"] <= 1
        world.model.gate.set()
        assert [one.result().status_code for one in (running, *waiting)] == [200] * 3
        world.until(world.idle)
        now = samples(world)
        assert now["vllm:num_requests_waiting"] == now["vllm:kv_cache_usage_perc"] == 0


def test_one_that_waits_for_anothers_prefix_is_deferred(folder: Path) -> None:
    """Two of the same long prompt: the second begins when the first's blocks are there."""
    asked = {"messages": [{"role": "user", "content": "x" * 100}]}
    with serving(folder) as world, ThreadPoolExecutor(2) as pool:
        world.model.gate.clear()
        twins = [pool.submit(world.post, n=2, **asked)]
        world.until(lambda: world.health()["running"] == 1)
        now = samples(world)
        assert now["headgate_waiting_requests prefix"] == 1
        assert now["vllm:num_requests_waiting_by_reason deferred"] == 1
        world.model.gate.set()
        assert [one.result().status_code for one in twins] == [200]


def test_every_end_has_its_reason(folder: Path) -> None:
    """A client that left, a failed step, a missed deadline; none of them is a whole answer. What
    was computed for one that had left was in vain."""
    with serving(folder) as world:
        world.model.gate.clear()
        world.leave(lambda: world.health()["running"] == 1)
        world.until(lambda: world.health()["streams"] == 0)
        world.model.gate.set()
        world.until(world.idle)
        world.model.failures.append(RuntimeError("broken"))
        assert world.post().status_code == 500
        headers = {"x-slo-deadline-ms": "0.001"}
        assert world.client.post(CHAT, json=HELLO, headers=headers).status_code == 504
        world.until(world.idle)
        now = samples(world)
        assert now["headgate_requests_total abort"] == 1
        assert now["headgate_late_tokens_total"] == 1
        assert now["headgate_abandoned_tokens_total abort"] == 1
        assert now["headgate_requests_total error"] == 1
        assert now["vllm:request_success_total error"] == 1
        ends = sum(
            value for name, value in now.items() if name.startswith("headgate_requests_total")
        )
        assert ends == 3
        whole = now["headgate_requests_total stop"] + now["headgate_requests_total length"]
        assert now["headgate_request_seconds_count"] == whole


def test_targets_are_judged(folder: Path) -> None:
    """An hour is met and a nanosecond is not; who names no target is not counted."""
    with serving(folder) as world:
        for target in ("3600000", "0.000001"):
            headers = {"x-slo-ttft-ms": target, "x-slo-tpot-ms": target}
            assert world.client.post(CHAT, json=HELLO, headers=headers).status_code == 200
        world.post()
        world.until(world.idle)
        now = samples(world)
    for target in ("ttft", "tpot"):
        for met in ("true", "false"):
            assert now[f"headgate_target_requests_total {met} {target}"] == 1


def test_traffic_adds_no_series_and_no_names(folder: Path) -> None:
    """Users, sessions, salts, request ids and prompts leave no trace on the page."""
    with serving(folder) as world:
        world.post()
        before = {
            line.rpartition(" ")[0] for line in world.client.get("/metrics").text.splitlines()
        }
        for number in range(5):
            secret = f"secret{number}"
            body = HELLO | {
                "user": secret,
                "cache_salt": secret,
                "metadata": {"session": secret},
                "messages": [{"role": "user", "content": secret}],
            }
            headers = {"x-request-id": secret, "x-session-id": secret}
            assert world.client.post(CHAT, json=body, headers=headers).status_code == 200
        text = world.client.get("/metrics").text
    assert "secret" not in text
    after = {line.rpartition(" ")[0] for line in text.splitlines()}
    assert {line for line in after ^ before if not line.startswith("process_")} == set()
    assert len(after) < 2000


def test_pages_are_consistent_while_the_engine_runs(folder: Path) -> None:
    """Scrapes in the middle of work: counts never fall, "+Inf" is the count, buckets ascend."""
    with serving(folder) as world, ThreadPoolExecutor(8) as pool:
        work = [pool.submit(world.post, max_tokens=100, n=4) for _ in range(8)]
        last: dict[str, float] = {}
        while not all(one.done() for one in work):
            now: dict[str, float] = {}
            for family in ours(scrape(world)).values():
                if family.type == "gauge":
                    continue
                for sample in family.samples:
                    now[f"{sample.name} {sorted(sample.labels.items())}"] = sample.value
            assert all(value >= last.get(name, 0) for name, value in now.items())
            last = now
        for family in ours(scrape(world)).values():
            if family.type == "histogram":
                for path in {s.labels.get("handler") for s in family.samples}:
                    mine = [s for s in family.samples if s.labels.get("handler") == path]
                    buckets = [s.value for s in mine if s.name.endswith("_bucket")]
                    (count,) = (s.value for s in mine if s.name.endswith("_count"))
                    assert buckets == sorted(buckets)
                    assert buckets[-1] == count


def test_names_are_given_once() -> None:
    """Two families may share a number, as in vLLM, but no two share a name."""
    names = [name for families in FAMILIES.values() for family in families for name in family.names]
    assert len(names) == len(set(names))
    assert all(name.startswith(("vllm:", "headgate_", "http_")) for name in names)
