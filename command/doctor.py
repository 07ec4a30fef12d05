"""`headgate doctor`: what is installed, what this machine is, what would run, what is wrong.

Reads versions and file headers; importing torch takes seconds and is left to `--deep`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from command.machine import PortError, bind, cores, graphics_cards, memory_bytes, processor
from command.screen import columns, size
from command.serve import threads_of, version
from command.versions import within
from command.weights import Weights, kv_bytes, weights_of
from policies.load import (
    PolicyError,
    admin_problems,
    key_problems,
    load,
    resolve_adapters,
    resolve_draft,
    resolve_model,
    with_environment,
)
from policies.model_folder import ModelError, check_folder, pocket_folder, served_name
from policies.schema import Deployment, Runtime

State = Literal["ok", "warn", "wrong"]
_DEEP_S = 120.0
_DISK_WANTED_BYTES = 2 * 2**30
_TORCH_FACTS = """
import json, torch
cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(),
    "cuda": [torch.cuda.get_device_name(card) for card in cards]}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do unless it is fine."""

    state: State
    what: str
    found: str
    next: str = ""


def examine(policy: Path, *, deep: bool, as_json: bool) -> int:
    """Prints the findings; 1 if anything is wrong."""
    findings = list(look(policy, deep=deep))
    wrong = sum(finding.state == "wrong" for finding in findings)
    warned = sum(finding.state == "warn" for finding in findings)
    if as_json:
        report = {"ok": not wrong, "findings": [asdict(finding) for finding in findings]}
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo("\n".join(_table(findings)))
        click.echo(
            f"\n{wrong} wrong, {warned} to know about" if wrong or warned else "\nall is well"
        )
    return 1 if wrong else 0


def _table(findings: list[Finding]) -> list[str]:
    colours = {"ok": "green", "warn": "yellow", "wrong": "red"}
    lines = columns([(found.state.ljust(5), found.what, found.found) for found in findings], "")
    table = []
    for finding, line in zip(findings, lines, strict=True):
        state = finding.state
        table.append(click.style(line[:5], fg=colours[state]) + line[5:])
        if finding.next:
            table.append(f"       -> {finding.next}")
    return table


def look(policy: Path, *, deep: bool) -> Iterator[Finding]:
    """Every finding, from the machine up to what would run."""
    yield from _machine()
    yield from _packages()
    yield from _device(deep)
    yield from _disk()
    yield from _pocket()
    yield from _policy(policy)


# ---- the machine and what is installed ----------------------------------------------------------


def _machine() -> Iterator[Finding]:
    ours = sys.version_info[:2]
    advice = "" if ours >= (3, 11) else "Headgate needs Python 3.11 or newer"
    python = f"{platform.python_version()} at {sys.executable}"
    yield Finding("wrong" if advice else "ok", "Python", python, advice)
    if platform.system() in ("Linux", "Darwin"):
        yield Finding("ok", "system", platform.platform())
    else:
        advice = "the supervisor needs Linux or macOS; on Windows use WSL"
        yield Finding("wrong", "system", platform.platform(), advice)
    name, flags = processor()
    count = cores()
    yield Finding("ok", "processor", f"{name}, {count} core{'s' if count > 1 else ''}")
    yield Finding("ok", "fast paths", ", ".join(flags) or "none that we know of")
    memory = memory_bytes()
    if memory:
        total, available = memory
        tight = available < 2**30
        found = f"{size(available)} available of {size(total)}"
        advice = "less than 1 GiB is available: a model may not load" if tight else ""
        yield Finding("warn" if tight else "ok", "memory", found, advice)


def _packages() -> Iterator[Finding]:
    """Versions beside what the installed metadata of headgate asks for."""
    try:
        wanted = importlib.metadata.requires("headgate") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("wrong", "headgate", "not installed", "pip install -e '.[runtime]'")
        return
    yield Finding("ok", "headgate", version())
    for line in wanted:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", marker)
        if "sys_platform" in marker or (extra and extra[1] != "runtime"):
            continue
        yield _package(requirement.strip(), needed_by=extra[1] if extra else None)
    if shutil.which("g++") or shutil.which("c++"):
        yield Finding("ok", "C++ compiler", shutil.which("g++") or shutil.which("c++") or "")
    else:
        advice = "only compiled kernels need it: apt install g++"
        yield Finding("warn", "C++ compiler", "none", advice)


def _package(requirement: str, needed_by: str | None) -> Finding:
    found = re.match(r"[\w.-]+", requirement)
    name = found[0].rstrip(".-") if found else requirement
    bounds = requirement.removeprefix(name).replace("(", "").replace(")", "").strip()
    install = f"pip install 'headgate{f'[{needed_by}]' if needed_by else ''}'"
    try:
        have = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        missing: State = "warn" if needed_by else "wrong"
        why = f"the runtime needs it: {install}; a gateway alone does not" if needed_by else install
        return Finding(missing, name, f"not installed, wanted {bounds or 'any'}", why)
    if within(have, bounds):
        return Finding("ok", name, have)
    return Finding("wrong", name, f"{have}, wanted {bounds}", install)


def _device(deep: bool) -> Iterator[Finding]:
    """CUDA as the driver and torch's build tell it; `deep` asks torch itself."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    cards = graphics_cards()
    if cards and "+cpu" in torch:
        advice = "this torch is built without CUDA: install a CUDA build to use the card"
        yield Finding("warn", "device", f"cpu, though there is {'; '.join(cards)}", advice)
    else:
        yield Finding("ok", "device", "; ".join(cards) or "cpu")
    if not deep:
        return
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _TORCH_FACTS],
            capture_output=True,
            text=True,
            timeout=_DEEP_S,
            check=True,
        )
        facts = json.loads(asked.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        told = getattr(error, "stderr", None) or str(error)
        last = str(told).strip().splitlines()[-1:]
        yield Finding("wrong", "torch itself", last[0] if last else "", "reinstall torch")
        return
    devices = ", ".join(facts["cuda"]) or "cpu"
    yield Finding(
        "ok", "torch itself", f"{facts['torch']} on {devices}, {facts['threads']} threads"
    )


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(sys.prefix).free
    tight = free < _DISK_WANTED_BYTES
    advice = "torch and a model want about 2 GiB" if tight else ""
    found = f"{size(free)} free beside {sys.prefix}"
    yield Finding("warn" if tight else "ok", "disk", found, advice)


# ---- models -------------------------------------------------------------------------------------


def _pocket() -> Iterator[Finding]:
    for part in ("target", "draft"):
        try:
            folder = pocket_folder(part)
            if not folder.is_dir():
                raise ModelError(f"{folder} is missing")
            check_folder(folder)
            yield Finding("ok", f"pocket {part}", _describe(weights_of(folder)))
        except ModelError as error:
            state: State = "wrong" if part == "target" else "warn"
            yield Finding(state, f"pocket {part}", str(error), "install headgate again")


def _describe(weights: Weights) -> str:
    millions = weights.parameters / 1e6
    return f"{millions:.1f} M parameters, {'/'.join(weights.dtypes)}, {size(weights.bytes)}"


# ---- the policy and what would run --------------------------------------------------------------


def _policy(policy: Path) -> Iterator[Finding]:
    try:
        deployment = with_environment(load(policy))
    except PolicyError as error:
        for problem in error.problems:
            yield Finding("wrong", "policy", str(problem), "mend it: headgate policy check FILE")
        return
    yield Finding("ok", "policy", str(policy))
    yield _port(deployment)
    runtime = deployment.runtime
    if runtime:
        try:
            model = resolve_model(policy, runtime)
            yield from _would_run(runtime, model)
        except (PolicyError, ModelError) as error:
            yield Finding("wrong", "model", str(error), "mend runtime.model, or the folder")
        try:
            resolve_adapters(policy, runtime)
            resolve_draft(policy, runtime)
        except PolicyError as error:
            yield Finding("wrong", "adapters", str(error), "mend runtime.adapters, or the folder")
    shared = admin_problems(policy, deployment)
    advice = "set another key where headgate starts: `headgate policy key` makes one"
    yield from (Finding("wrong", "admin key", str(problem), advice) for problem in shared)
    problems = [one for one in key_problems(policy, deployment) if one not in shared]
    advice = "set it where headgate starts, or remove api_key_env: then clients' keys go on"
    yield from (Finding("wrong", "upstream", str(problem), advice) for problem in problems)
    wrong = {problem.path for problem in problems}
    for index, upstream in enumerate(deployment.upstreams):
        if f"upstreams[{index}].api_key_env" not in wrong:
            yield Finding("ok", "upstream", upstream.url)


def _port(deployment: Deployment) -> Finding:
    gateway = deployment.gateway
    try:
        bind(gateway.host, gateway.port).close()
    except PortError as error:
        advice = "if this is headgate itself, all is well; otherwise HEADGATE_PORT=8081"
        return Finding("warn", "port", str(error), advice)
    return Finding("ok", "port", f"{gateway.host}:{gateway.port} is free")


def _would_run(runtime: Runtime, model: Path | str) -> Iterator[Finding]:
    threads = threads_of(runtime)
    workers = f"{runtime.workers} worker{'s' if runtime.workers > 1 else ''}"
    each = f"{threads} thread{'s' if threads > 1 else ''}"
    yield Finding(
        "ok",
        "would run",
        f"{workers} x {each}, serving {served_name(runtime, model)!r}",
    )
    if runtime.workers * threads > cores():
        advice = f"{runtime.workers} x {threads} threads share {cores()} cores: expect slow answers"
        yield Finding("warn", "threads", "more than cores", advice)
    if isinstance(model, str):
        yield Finding("ok", "model", f"{model} from the hub, or from its cache")
        return
    weights = weights_of(model)
    yield Finding("ok", "model", f"{model}: {_describe(weights)}")
    dtype = _dtype(runtime)
    width = 4 if dtype == "fp32" else 2
    pool = kv_bytes(json.loads((model / "config.json").read_bytes()), runtime.kv_tokens, width)
    if pool is None:
        yield Finding("warn", "KV pool", "config.json does not tell its size", "")
        return
    need = runtime.workers * (weights.parameters * width + pool)
    yield Finding(
        "ok", "KV pool", f"{runtime.kv_tokens} tokens, {size(pool)} in {dtype} for each worker"
    )
    memory = memory_bytes()
    if memory and need > memory[1] and not graphics_cards():
        advice = "lower runtime.kv_tokens or runtime.workers, or take a smaller model"
        found = f"{size(need)} for weights and KV, {size(memory[1])} available"
        yield Finding("wrong", "memory", found, advice)


def _dtype(runtime: Runtime) -> str:
    if runtime.dtype != "auto":
        return runtime.dtype
    on_card = runtime.device == "cuda" or (runtime.device == "auto" and bool(graphics_cards()))
    return "bf16" if on_card else "fp32"
