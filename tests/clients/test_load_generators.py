"""aiperf and inference-perf against the real stack: what they read of our `/metrics`.

`make clients`, where they are installed as `benchmarks/lab/peers_setup.py` does; inference-perf
asks a Prometheus server, which Debian has. No network is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.lab.load_tools import hub, installed, run
from command.machine import free_ports
from tests.end_to_end.stack import ROOT, Stack, assert_idle, until

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif("HEADGATE_CLIENTS" not in os.environ, reason="run `make clients`"),
]
TOKENIZER = ROOT / "pocket" / "target"
PROMETHEUS = """global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: headgate
    static_configs: [{{targets: ['{gateway}', '{worker}']}}]
"""
INFERENCE_PERF = """api: {{type: chat, streaming: true}}
data:
  type: shared_prefix
  shared_prefix:
    num_groups: 2
    num_prompts_per_group: 6
    system_prompt_len: 200
    question_len: 20
    output_len: 16
load: {{type: constant, stages: [{{rate: 3, duration: 8}}], num_workers: 1}}
server: {{type: vllm, model_name: pocket, base_url: "{gateway}", ignore_eos: true}}
tokenizer: {{pretrained_model_name_or_path: {tokenizer}}}
metrics: {{type: prometheus, prometheus: {{url: "{prometheus}", scrape_interval: 1}}}}
storage: {{local_storage: {{path: {out}}}}}
"""


@pytest.mark.skipif(not installed("aiperf"), reason="aiperf is not in the peers' environments")
def test_aiperf_reads_both_pages(stack: Stack, tmp_path: Path) -> None:
    """It scrapes the gateway by itself and a worker where it is told to: cached tokens and use of
    the KV cache under vLLM's names, first tokens under OpenTelemetry's."""
    out = tmp_path / "aiperf"
    run(
        "aiperf", tmp_path, "profile", "--model", "pocket", "--url", stack.gateway.url,
        "--endpoint-type", "chat", "--streaming", "--tokenizer", "local/tok",
        "--request-count", "24", "--concurrency", "4", "--use-server-token-count",
        "--shared-system-prompt-length", "200", "--synthetic-input-tokens-mean", "40",
        "--output-tokens-mean", "16", "--output-tokens-stddev", "0", "--random-seed", "7",
        "--extra-inputs", "ignore_eos:true", "--server-metrics", f"{stack.worker.url}/metrics",
        "--artifact-dir", str(out), "--ui", "none", hub=hub(tmp_path),
    )  # fmt: skip
    found = json.loads((out / "server_metrics_export.json").read_text("utf-8"))
    metrics = found["metrics"]
    told = json.loads((out / "profile_export_aiperf.json").read_text("utf-8"))
    cached = told["total_usage_prompt_cache_read_tokens"]["avg"]
    assert cached > 12 * 192
    assert delta(metrics, "vllm:prompt_tokens_cached") == cached
    assert delta(metrics, "headgate_gateway_prompt_tokens", rung="delivered") == cached
    assert delta(metrics, "vllm:generation_tokens") == 24 * 16
    assert largest(metrics, "vllm:kv_cache_usage_perc") > 0
    assert "gen_ai_server_time_to_first_token_seconds" in metrics
    assert not delta(metrics, "headgate_token_ledger_violations")
    assert_idle(stack.worker)


@pytest.mark.skipif(
    not (installed("inference-perf") and shutil.which("prometheus")),
    reason="inference-perf is not in the peers' environments, or there is no prometheus",
)
def test_inference_perf_reports_the_cache_through_prometheus(stack: Stack, tmp_path: Path) -> None:
    """A real Prometheus scrapes both pages; inference-perf asks it by vLLM's names."""
    with prometheus(stack, tmp_path) as url:
        config = tmp_path / "inference-perf.yaml"
        out = tmp_path / "out"
        config.write_text(
            INFERENCE_PERF.format(
                gateway=stack.gateway.url, prometheus=url, tokenizer=TOKENIZER, out=out
            ),
            encoding="utf-8",
        )
        run("inference-perf", tmp_path, "--config_file", str(config))
    (file,) = out.rglob("summary_prometheus_metrics.json")
    told = json.loads(file.read_text("utf-8"))["successes"]
    assert told["count"] == pytest.approx(24, abs=4)  # Prometheus extrapolates
    assert told["prompt_tokens_cached"] > 12 * 192
    assert told["prefix_cache_hit_percent"]["mean"] > 50
    assert told["kv_cache_usage_percentage"]["mean"] > 0
    assert told["time_to_first_token"]["mean"] > 0
    assert_idle(stack.worker)


@contextlib.contextmanager
def prometheus(stack: Stack, folder: Path) -> Iterator[str]:
    """A server that has scraped both pages once."""
    targets = [one.url.removeprefix("http://") for one in (stack.gateway, stack.worker)]
    config = folder / "prometheus.yml"
    config.write_text(PROMETHEUS.format(gateway=targets[0], worker=targets[1]), encoding="utf-8")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        until(lambda: up(url) == 2, 60.0, lambda: (folder / "prometheus.log").read_text())
        yield url
    finally:
        process.terminate()
        process.wait(20)


def up(url: str) -> int:
    """How many targets were scraped well."""
    with contextlib.suppress(httpx.TransportError):
        answer = httpx.get(f"{url}/api/v1/query", params={"query": "sum(up)"}).json()
        for one in answer["data"]["result"]:
            return int(one["value"][1])
    return 0


def delta(metrics: dict[str, Any], name: str, **labels: str) -> float:
    """By how much a counter grew while aiperf measured, over the series with these labels."""
    mine = (one for one in metrics[name]["series"] if labels.items() <= one["labels"].items())
    return sum(float(one["stats"]["total"]) for one in mine)


def largest(metrics: dict[str, Any], name: str) -> float:
    return max(float(one["stats"]["max"]) for one in metrics[name]["series"])
