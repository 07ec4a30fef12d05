"""`python -m runtime POLICY --port N`: one worker process, as `headgate serve` starts it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn

from policies import load as policy_file
from policies.devices import Devices
from policies.enabling import gated, news
from policies.loopback import is_loopback
from policies.model_facts import read_weights
from policies.model_folder import served_name
from policies.open_files import take_files
from policies.schema import Deployment, Runtime

if TYPE_CHECKING:
    from runtime.streams import Streams
    from runtime.worker import Served

LOOPBACK = "127.0.0.1"
EXIT_REFUSED = 3  # the model cannot be served: starting again would not help


@dataclass(frozen=True, slots=True)
class Door:
    """Where a worker listens, and what it asks for."""

    host: str
    port: int
    key: str | None = field(default=None, repr=False)


def main(argv: list[str] | None = None) -> None:
    """Serves the policy's model on one port until told to stop; exit codes 0: after a drain, 2: a
    wrong policy, 3: a model that cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m runtime", description=__doc__)
    parser.add_argument(
        "policy", type=Path, nargs="?", help="policy file; its `runtime` part is obeyed"
    )
    parser.add_argument("--port", type=int, help="port to listen on")
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="address to listen on; one that is not loopback needs `runtime.key_env`",
    )
    parser.add_argument("--rank", type=int, default=0, help="this worker's number, from 0")
    parser.add_argument(
        "--devices", action="store_true", help="print what could compute here, as JSON, and end"
    )
    args = parser.parse_args(argv)
    if args.devices:
        print_devices()
        return
    if args.policy is None or args.port is None:
        parser.error("give a policy file and --port")
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(name)s: %(message)s")
    try:
        found = gated(args.policy, policy_file.load(args.policy), time.time(), _devices)
        policy = policy_file.resolve_folders(args.policy, found.deployment)
        if policy.runtime is None:
            parser.error(f"{args.policy} has no `runtime`")
        source = policy_file.resolve_model(args.policy, policy.runtime)
        adapters = policy_file.resolve_adapters(args.policy, policy.runtime)
        draft = policy_file.resolve_draft(args.policy, policy.runtime)
        problems = policy_file.guess_problems(args.policy, policy.runtime)
        if problems := [*problems, *policy_file.tier_problems(args.policy, policy)]:
            raise policy_file.PolicyError(*problems)
        door = Door(args.host, args.port, policy_file.worker_key(policy.runtime))
    except policy_file.PolicyError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyError as missing:
        parser.error(f"runtime.key_env: the variable {missing.args[0]} is not set, or empty")
    if door.key is None and not is_loopback(door.host):
        parser.error(f"--host {door.host}: others could ask; give runtime.key_env in {args.policy}")
    for row in news(found):
        logging.getLogger("runtime").warning("%s: %s  %s", *row)
    serve(policy, source, adapters, draft, door, args.rank, found.payload())


def print_devices() -> None:
    """For programs without torch, which decide what may run."""
    print(json.dumps(_devices()))


def _devices() -> Devices:
    from runtime.fingerprint import known_devices

    return known_devices()


def serve(
    policy: Deployment,
    source: Path | str,
    adapters: Path | None,
    draft: Path | str | None,
    door: Door,
    rank: int,
    optimizations: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Blocks until the server has been told to stop and running answers have had their time."""
    from runtime.server import create_app
    from runtime.tracing import Tracer
    from runtime.wire import RUN_TOKEN_ENV
    from runtime.worker import Worker
    from telemetry.otlp import exporter

    assert policy.runtime is not None
    runtime = policy.runtime
    worker = Worker(
        lambda streams: replace(
            load_served(runtime, source, adapters, draft, streams, rank),
            optimizations=optimizations,
        ),
        max_body_bytes=policy.gateway.max_body_bytes,
        on_failure=give_up,
        run_token=os.environ.get(RUN_TOKEN_ENV),
        tracer=Tracer(policy.tracing, exporter(policy.tracing.endpoint)),
    )
    config = uvicorn.Config(
        create_app(worker, door.key),
        host=door.host,
        port=door.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(policy.gateway.drain_s)),
    )
    take_files()
    server = Server(config)
    server.run()
    leave(0 if server.started else 1)


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for what a thread still loads or computes for nobody."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


class Server(uvicorn.Server):
    """Drains on SIGTERM and SIGINT: nothing new, running answers get drain_s.

    A second SIGINT ends it at once.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # uvicorn's
        """Without uvicorn's replay of the signal: a drained worker exits with 0."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def load_served(
    runtime: Runtime,
    source: Path | str,
    adapters: Path | None,
    draft: Path | str | None,
    streams: Streams,
    rank: int,
) -> Served:
    """Loads model, adapters and tokenizer and builds the engine; runs in the engine's thread."""
    import torch

    from cache.tokens import Tokenizer
    from runtime import fingerprint
    from runtime.adapters import load_adapters
    from runtime.choices import Choices, this_machine, ways_file
    from runtime.engine import Engine
    from runtime.events import BlockEvents
    from runtime.generation import recommended_sampling
    from runtime.loading import load_model
    from runtime.metrics_page import Page
    from runtime.proposers import open_speculation
    from runtime.swap import open_swap
    from runtime.tally import Tally
    from runtime.worker import Served

    started = time.perf_counter()
    events = BlockEvents(runtime.kv_events, rank) if runtime.kv_events else None
    if runtime.threads:  # else OMP_NUM_THREADS, which `headgate serve` sets, or all cores
        torch.set_num_threads(runtime.threads)
    compiles = runtime.compile == "auto"
    choices = Choices(ways_file(), this_machine(compiles=compiles))
    with ThreadPoolExecutor(1, "digests") as beside:  # hashing lets the interpreter go on
        digests = isinstance(source, Path) and beside.submit(read_weights, source)
        model, folder = load_model(
            source,
            kv_tokens=runtime.kv_tokens,
            device=runtime.device,
            dtype=runtime.dtype,
            weights=runtime.weights,
            revision=runtime.revision,
            kv=runtime.kv,
            compiles=compiles,
            choices=choices,
        )
        weights = digests.result() if digests else read_weights(folder)
    tokenizer = Tokenizer.load(folder)
    adapted = load_adapters(model, adapters) if adapters else {}
    digests_of = {name: one.identity for name, one in adapted.items()}
    name = served_name(runtime, source)
    speculation, drafts = open_speculation(runtime, model, tokenizer, draft, source, name, choices)
    identity = fingerprint.take(
        folder,
        weights,
        runtime,
        model.device,
        arithmetic=fingerprint.arithmetic_facts(model),
        adapters=digests_of,
        draft=read_weights(drafts) if drafts else None,
    )
    made_of = (identity.leaves["weights"], identity.leaves["arithmetic"], runtime.weights)
    content = " ".join(map(str, made_of))
    tally = Tally(model.context_tokens)
    swap = open_swap(model, runtime.tiers, content) if runtime.tiers is not None else None
    if events and swap:
        events.follow(swap.tiers)
    engine = Engine(
        model,
        tokenizer,
        emit=streams.emit,
        step_tokens=runtime.step_tokens,
        max_sequences=runtime.max_sequences,
        max_waiting=runtime.max_waiting,
        context_tokens=runtime.context_tokens,
        tpot_s=runtime.tpot_ms / 1000 if runtime.tpot_ms else None,
        adapters=adapted,
        watchers=[events] if events else (),
        listeners=[tally, events] if events else [tally],
        identity=content,
        swap=swap,
        speculation=speculation,
    )
    engine.calibrate()
    facts = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "parameters": model.parameters,
        "weights": dict(model.weights.held),
        "kv_bytes": model.kv_bytes,
        "load_s": round(time.perf_counter() - started, 2),
        "fingerprint": identity.short,
    }
    logging.getLogger("runtime").info("%s is loaded: %s", source, facts)
    page = Page(
        tally,
        engine,
        model_name=name,
        rank=rank,
        identity=identity,
        events=events,
        late_tokens=lambda: streams.late_tokens,
    )
    sampling = recommended_sampling(folder)
    return Served(
        name, engine, tokenizer, facts, int(time.time()), identity, page, events, sampling
    )


def give_up(error: BaseException) -> None:
    """A worker without an engine is of no use: say why and let the supervisor decide."""
    from cache.template import TemplateProblem
    from cache.tokens import TokenizerUnusable
    from runtime.events import EventsRefused
    from runtime.model import ModelRefused

    hopeless = isinstance(error, ModelRefused | TokenizerUnusable | TemplateProblem)
    if hopeless or isinstance(error, EventsRefused):
        logging.getLogger("runtime").error("%s", error)
    else:
        logging.getLogger("runtime").critical("the engine's thread died", exc_info=error)
    leave(EXIT_REFUSED if hopeless else 1)


if __name__ == "__main__":
    main()
