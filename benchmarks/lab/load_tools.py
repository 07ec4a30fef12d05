"""Other people's load generators against a server: how each is started, and what it measured.

Each lives in an environment of its own (`peers_setup.CLIENTS`) and never asks the network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.lab.conditions import ROOT
from benchmarks.lab.models import peers_home
from benchmarks.lab.paced_server import MODEL
from benchmarks.lab.report import MeasurementFailed

_TOKENIZER = ROOT / "pocket" / "target"
_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
_COMMIT = "0" * 40
_LIMIT_S = 400.0


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one length each, so many under way."""

    requests: int
    at_once: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Times:
    """Medians over requests. `tpot_ms` is what these two call inter token latency: from the first
    token to the last, over the number of tokens less one."""

    ttft_ms: float
    tpot_ms: float
    requests: int


def installed(tool: str) -> bool:
    return (peers_home() / tool / "bin" / tool).is_file()


def guidellm(url: str, load: Load, folder: Path) -> Times:
    out = folder / "guidellm.json"
    run(
        "guidellm", folder, "run",
        "--backend", f"kind=openai_http,target={url},model={MODEL}",
        "--profile", f"kind=concurrent,streams={load.at_once}",
        "--constraint", f"kind=max_requests,count={load.requests}",
        "--tokenizer", f"kind=hf_auto,model={_TOKENIZER}",
        "--data", f"kind=synthetic_text,prompt_tokens={load.prompt_tokens},"
        f"output_tokens={load.answer_tokens}",
        "--output", f"kind=json,path={out}", "--disable-progress",
    )  # fmt: skip
    done = json.loads(out.read_text("utf-8"))["benchmarks"][0]["requests"]["successful"]
    return Times(
        median(one["time_to_first_token_ms"] for one in done),
        median(one["inter_token_latency_ms"] for one in done),
        len(done),
    )


def aiperf(url: str, load: Load, folder: Path) -> Times:
    out = folder / "aiperf"
    run(
        "aiperf", folder, "profile", "--model", MODEL, "--url", url,
        "--endpoint-type", "chat", "--streaming", "--tokenizer", "local/tok",
        "--request-count", str(load.requests), "--concurrency", str(load.at_once),
        "--synthetic-input-tokens-mean", str(load.prompt_tokens),
        "--output-tokens-mean", str(load.answer_tokens), "--output-tokens-stddev", "0",
        "--use-server-token-count", "--random-seed", "7",
        "--artifact-dir", str(out), "--ui", "none",
        hub=hub(folder),
    )  # fmt: skip
    told = json.loads((out / "profile_export_aiperf.json").read_text("utf-8"))
    return Times(
        told["time_to_first_token"]["p50"],
        told["inter_token_latency"]["p50"],
        told["time_to_first_token"]["count"],
    )


TIMERS: dict[str, Callable[[str, Load, Path], Times]] = {"guidellm": guidellm, "aiperf": aiperf}


def guidellm_replay(url: str, recorded: Path, requests: int, folder: Path) -> None:
    """Plays a recorded file as it is."""
    data = {"kind": "otel", "source": {"kind": "json_file", "path": str(recorded)}}
    run(
        "guidellm", folder, "run",
        "--backend", f"kind=openai_http,target={url},model={MODEL}",
        "--profile", "kind=replay", "--data", json.dumps(data),
        "--constraint", f"kind=max_requests,count={requests}",
        "--tokenizer", f"kind=hf_auto,model={_TOKENIZER}",
        "--output", f"kind=json,path={folder / 'replay.json'}", "--disable-progress",
    )  # fmt: skip


_INFERENCE_PERF = """api: {{type: chat, streaming: true}}
data:
  type: otel_trace_replay
  otel_trace_replay:
    hf_dataset_path: {{path: json, data_files: {recorded}}}
    use_static_model: true
    static_model_name: {model}
load:
  type: trace_session_replay
  stages: [{{concurrent_sessions: 4}}]
  num_workers: 1
server: {{type: vllm, model_name: {model}, base_url: "{url}", ignore_eos: false}}
tokenizer: {{pretrained_model_name_or_path: {tokenizer}}}
storage: {{local_storage: {{path: {out}}}}}
"""


def inference_perf_replay(url: str, recorded: Path, _requests: int, folder: Path) -> None:
    """Plays a recorded file as it is, read as a table of one session a row."""
    config = folder / "inference-perf.yaml"
    config.write_text(
        _INFERENCE_PERF.format(
            recorded=recorded, url=url, model=MODEL, tokenizer=_TOKENIZER, out=folder / "out"
        ),
        encoding="utf-8",
    )
    run("inference-perf", folder, "--config_file", str(config))


REPLAYERS: dict[str, Callable[[str, Path, int, Path], None]] = {
    "guidellm": guidellm_replay,
    "inference-perf": inference_perf_replay,
}


def hub(folder: Path) -> Path:
    """A cache of a hub that has the tokenizer: aiperf takes no folder for one."""
    model = folder / "hub" / "models--local--tok"
    snapshot = model / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(_COMMIT, encoding="ascii")
    for name in _FILES:
        shutil.copyfile(_TOKENIZER / name, snapshot / name)
    return folder


def run(tool: str, folder: Path, *arguments: str, hub: Path | None = None) -> None:
    """To its end, with what it writes in `folder`. Raises MeasurementFailed where it fails."""
    command: Sequence[str] = (str(peers_home() / tool / "bin" / tool), *arguments)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "tables")}
    if hub is not None:
        environment["HF_HOME"] = str(hub)
    log = folder / f"{tool}.log"
    with log.open("wb") as stream:
        try:
            subprocess.run(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.STDOUT, check=True, timeout=_LIMIT_S,
            )  # fmt: skip
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = log.read_text("utf-8", "replace")[-1500:]
            raise MeasurementFailed(f"{tool} ended with {error}: {said}") from error
