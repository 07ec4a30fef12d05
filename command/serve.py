"""`headgate serve`: from a policy file to running programs, and what a person reads meanwhile.

Knows which programs a policy needs and how they are started; `supervisor` keeps them alive.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from command.machine import PortError, address, bind, cores, free_ports, reserve
from command.on_ray import OnRay, why_not
from command.processes import Health, Program
from command.run_folder import own_folder
from command.screen import Screen, columns
from command.supervisor import Supervisor
from policies import as_started
from policies.children import package_environment
from policies.devices import asked
from policies.enabling import Gated, for_children, gated, rows as told_of
from policies.load import (
    PolicyError,
    guess_problems,
    key_problems,
    load,
    package_problems,
    resolve_adapters,
    resolve_draft,
    resolve_model,
    tier_problems,
    with_environment,
    worker_key,
)
from policies.model_folder import served_name
from policies.schema import Deployment, Runtime
from runtime.wire import RUN_TOKEN_ENV

# Before SIGKILL, for a worker whose disk tier takes along what its pool holds.
_STORE_S = 5.0
# Between the end of the gateway's own drain and SIGKILL.
_GRACE_S = 5.0
_WORKER_HOST = "127.0.0.1"
_EXIT_REFUSED = 3  # runtime/__main__.py: the model cannot be served


class StartError(Exception):
    """What keeps a valid policy from being served on this machine."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will run: the policy with its file, the model that was found, the ports, the threads."""

    policy: Path
    deployment: Deployment
    model: Path | str | None  # None: upstreams only
    port: int
    worker_ports: tuple[int, ...]
    threads: int
    gateway_ports: tuple[int, ...] = ()  # of several gateway processes, each its own beside `port`
    held: socket.socket | None = None  # keeps `port` for them
    gated: Gated | None = None  # what of the policy's optimizations may be served
    on_ray: OnRay | None = None  # where the workers run, if not here
    fleet_port: int = 0
    folder: Path | None = None  # of this user alone, for as long as it serves

    @property
    def url(self) -> str:
        return f"http://{address(self.deployment.gateway.host, self.port)}"

    @property
    def served_name(self) -> str:
        """What clients send as `model`."""
        runtime = self.deployment.runtime
        return served_name(runtime, self.model) if runtime and self.model else "MODEL"


def threads_of(runtime: Runtime, environ: Mapping[str, str] = os.environ) -> int:
    """CPU threads of one worker: the policy's, else OMP_NUM_THREADS, else cores by workers."""
    wish = environ.get("OMP_NUM_THREADS", "")
    if runtime.threads is not None:
        return runtime.threads
    if wish.isascii() and wish.isdecimal() and int(wish) > 0:
        return int(wish)
    return max(1, cores() // runtime.workers)


def plan(policy: Path, on_ray: OnRay | None = None) -> Plan:
    """Checks all that can be checked before anything runs. Raises PolicyError or StartError."""
    found = gated(policy, load(policy), time.time())
    deployment = with_environment(found.deployment)
    problems = key_problems(policy, deployment)
    if problems := [*problems, *package_problems(policy, deployment)]:
        raise PolicyError(*problems)
    runtime = deployment.runtime
    model = resolve_model(policy, runtime) if runtime else None
    if runtime:
        resolve_adapters(policy, runtime)
        resolve_draft(policy, runtime)
        problems = guess_problems(policy, runtime)
        if problems := [*problems, *tier_problems(policy, deployment, served_here=True)]:
            raise PolicyError(*problems)
    if on_ray is not None and (why := why_not(deployment)):
        raise StartError(why)
    here = runtime if on_ray is None else None  # on Ray it is installed where it runs
    if here and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise StartError(
            "the runtime needs torch and transformers, which are not installed: "
            "pip install 'headgate[runtime]'"
        )
    gateway = deployment.gateway
    several = gateway.processes if gateway.processes > 1 else 0
    workers = here.workers if here else 0
    try:
        front = (reserve if several else bind)(gateway.host, gateway.port)
        port = front.getsockname()[1]
        private = free_ports(workers + several + (on_ray is not None), _WORKER_HOST)
    except PortError as error:
        advice = f"free it or HEADGATE_PORT={_another(gateway.port)} headgate serve"
        raise StartError(f"{error}; {advice}") from None
    if not several:
        front.close()
    return Plan(
        policy.absolute(),
        deployment,
        model,
        port,
        tuple(private[:workers]),
        threads_of(here) if here else 0,
        tuple(private[workers : workers + several]),
        front if several else None,
        found,
        on_ray,
        private[-1] if on_ray else 0,
    )


def _another(port: int) -> int:
    return port + 1 if 1024 <= port < 65535 else 8081


def programs_of(plan: Plan) -> list[Program]:
    """The workers, or what keeps them on Ray, then the gateway processes in front of them.

    What starts later goes by the policy as it is now: a gateway reads the file first, and takes of
    it what it would have taken while it ran.
    """
    environment = _environment(plan.gated)
    copy = None if plan.folder is None else as_started.copied(plan.policy, plan.folder)
    if plan.on_ray is None:
        by_copy = as_started.environment(plan.policy, copy) if copy else {}
        workers = _workers(plan, environment | by_copy)
        replicas = [part for worker in workers for part in ("--replica", worker.url)]
        return [*workers, *_fronts(plan, environment, replicas, copy)]
    environment |= plan.on_ray.environment(plan.deployment)
    fronts = _fronts(plan, environment, ["--fleet", str(plan.on_ray.book)], copy)
    urls = [front.url for front in fronts]
    fleet = plan.on_ray.program(plan.policy, plan.deployment, plan.fleet_port, urls, environment)
    return [fleet, *fronts]


# -P: a folder `runtime` where the user happens to stand must not shadow ours.
_PYTHON = (sys.executable, "-P", "-m")


def _workers(plan: Plan, environment: dict[str, str]) -> list[Program]:
    for_workers = environment | {
        "OMP_NUM_THREADS": str(plan.threads),
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    policy = str(plan.policy)
    return [
        Program(
            f"worker {index}",
            (*_PYTHON, "runtime", policy, "--port", str(port), "--rank", str(index)),
            _WORKER_HOST,
            port,
            for_workers,
            grace_s=_STORE_S,
            refusal=_EXIT_REFUSED,
            fact="blocks",
            key=worker_key(plan.deployment.runtime),
        )
        for index, port in enumerate(plan.worker_ports)
    ]


def _fronts(
    plan: Plan, environment: dict[str, str], replicas: list[str], copy: Path | None
) -> list[Program]:
    """The gateway, or several on the one port."""
    gateway = plan.deployment.gateway
    started = () if copy is None else ("--started", str(copy))
    front = Program(
        "gateway",
        (*_PYTHON, "gateway", str(plan.policy), "--port", str(plan.port), *replicas, *started),
        gateway.host,
        plan.port,
        environment,
        gateway.drain_s,
        _GRACE_S,
        fact="replicas",
    )
    together = () if plan.folder is None else ("--siblings", str(plan.folder))
    # Each is asked for its health at a port of its own: the shared one leads to any of them.
    return [
        replace(
            front,
            name=f"gateway {index}",
            argv=(*front.argv, "--private", str(port), "--process", str(index), *together),
            host=_WORKER_HOST,
            port=port,
        )
        for index, port in enumerate(plan.gateway_ports)
    ] or [front]


def _environment(found: Gated | None) -> dict[str, str]:
    """Children find our packages wherever they start, know each other by a token, and need not ask
    or tell again what was asked and told here."""
    environment = package_environment() | {RUN_TOKEN_ENV: secrets.token_hex(16)}
    return environment | asked() | (for_children(found) if found else {})


# ---- what a person reads ------------------------------------------------------------------------


def serve(policy: Path, screen: Screen, ray: str | None = None) -> int:
    """Serves until Ctrl-C; the exit code. Raises PolicyError or StartError before anything runs.

    `ray` is the address of a Ray cluster that the replicas run on.
    """
    with own_folder() as folder:
        on_ray = None if ray is None else OnRay(ray, folder)
        todo = replace(plan(policy, on_ray), folder=folder)
        programs = programs_of(todo)
        supervisor = Supervisor(programs, screen, fronts=max(1, len(todo.gateway_ports)))
        screen.say(*opening(todo, programs))

        def announce(took_s: float) -> None:
            health = {child.program.name: child.health or {} for child in supervisor.children}
            screen.say(*ready(todo, took_s, health))

        return asyncio.run(supervisor.run(announce))


def opening(plan: Plan, programs: list[Program]) -> list[str]:
    """What runs where."""
    runtime = plan.deployment.runtime
    count = len(plan.gateway_ports)
    several = f" by {count} processes" if count else ""
    rows = [("gateway", plan.url, _shortly(plan.policy) + several)]
    if runtime:
        model = f"{plan.served_name} from {_shortly(plan.model)}"
        what = f"{model}, {plan.threads} thread{'s' if plan.threads > 1 else ''}"
        rows += [(one.name, one.url, what) for one in programs[: len(plan.worker_ports)]]
        if plan.on_ray is not None:
            fleet = plan.deployment.fleet
            size = f"{fleet.replicas_min} to {fleet.replicas_max} replicas of {model}"
            rows.append(("fleet", f"Ray at {plan.on_ray.address}", size))
    rows += [("upstream", upstream.url, "") for upstream in plan.deployment.upstreams]
    lines = [f"headgate {version()}", *columns(rows)]
    lines += columns(told_of(plan.gated)) if plan.gated else []
    if count and plan.deployment.gateway.store is None:
        lines.append(f"  each of {count} gateways gives its share of limits: no gateway.store")
    return lines


def ready(plan: Plan, took_s: float, health: Mapping[str, Health]) -> list[str]:
    """Readiness, what the workers say of themselves, and lines to paste."""
    facts = [
        (name, ", ".join(str(state[key]) for key in ("device", "dtype") if state.get(key)))
        for name, state in health.items()
    ]
    pages = [f"http://{address(_WORKER_HOST, port)}/metrics" for port in plan.worker_ports]
    return [
        f"ready in {took_s:.1f} s",
        *columns([fact for fact in facts if fact[1]] + [("metrics", page) for page in pages]),
        "",
        f"  {plan.url}/v1",
        f"  {plan.url}/console",
        "",
        *curl(plan.url, plan.served_name, keys=bool(plan.deployment.gateway.tenants)),
        "",
        "or talk to it: headgate chat"
        + ("" if plan.port == 8080 else f" --url {plan.url}")
        + "    (Ctrl-C here drains and ends)",
    ]


def curl(url: str, model: str, *, keys: bool) -> list[str]:
    """A streaming request that the pocket model can answer, ready to paste. `keys`: with a
    tenant's, from where `headgate chat` has it."""
    facts = (
        "Facts:\\nOrder JR-9265 status: Packed.\\nOrder JR-9265 parcel: 4659-1394.\\n"
        "Order JR-9265 total: 713 euros.\\n\\n"
        "Which parcel does order JR-9265 have?"
    )
    quoted = json.dumps(model).replace("'", "'\\''")  # inside the shell's single quotes
    key = ' -H "Authorization: Bearer $HEADGATE_API_KEY"' if keys else ""
    return [
        f"curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{{",
        f'  "model": {quoted}, "temperature": 0, "stream": true, "messages": [',
        '    {"role": "system", "content": "Answer from the facts. Be exact and brief."},',
        f'    {{"role": "user", "content": "{facts}"}}]}}\'',
    ]


def version() -> str:
    try:
        return importlib.metadata.version("headgate")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _shortly(path: Path | str | None) -> str:
    """A path as seen from here, where that is shorter."""
    if isinstance(path, Path) and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return str(path)
