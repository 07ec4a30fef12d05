"""`python -m fleet POLICY`: keeps replicas on a Ray cluster. Started by `headgate serve --on ray`.

Tells gateways in a discovery file who takes requests, and asks them what they have for the
replicas.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from command.serve import version
from fleet.cluster import Job
from fleet.controller import Controller, Refused
from fleet.demand import Demands
from policies.as_started import place_of
from policies.load import FLEET_KEY_ENV, PolicyError, load
from policies.loopback import foreign_header
from policies.schema import Deployment, Runtime
from runtime.wire import RUN_TOKEN_ENV

EXIT_REFUSED = 3  # starting again would not help
LEASE_S = 60.0  # replicas end by themselves when this program is gone for so long
HOST = "127.0.0.1"

log = logging.getLogger("headgate.fleet")


def main(arguments: Sequence[str] | None = None) -> int:
    """Until SIGTERM; 0 after all replicas have drained, 1 without a cluster, 2 for a wrong policy,
    3 for one that no node can serve."""
    options = parse_options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s")
    try:
        policy = load(options.policy)
    except PolicyError as error:
        print(error, file=sys.stderr)
        return 2
    if policy.runtime is None:
        print(f"{options.policy} has no `runtime`", file=sys.stderr)
        return 2
    from fleet.ray_cluster import NoCluster, RayCluster, Share, connect

    job = job_of(options.policy, policy, policy.runtime)
    try:
        connect(options.address, f"headgate-{hashlib.sha256(job.key.encode()).hexdigest()[:16]}")
    except NoCluster as error:
        print(error, file=sys.stderr)
        return 1
    fleet = policy.fleet
    share = Share(cpus_of(policy), gpus_of(policy), fleet.resources, fleet.domain)
    demands = Demands(options.gateway, job.key)
    controller = Controller(RayCluster(share), fleet, job, options.book, demands)
    return serve(controller, demands, options.port)


def serve(controller: Controller, demands: Demands, port: int) -> int:
    """Runs the fleet beside its GET /health."""
    failed: list[BaseException] = []

    async def keep() -> None:
        try:
            await controller.run()
        except BaseException as error:
            failed.append(error)
            server.should_exit = True
            raise

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with demands:
            keeping = asyncio.create_task(keep())
            yield
            controller.end()
            await asyncio.wait([keeping])

    async def health(request: Request) -> JSONResponse:
        if foreign_header(request.scope["headers"], HOST) is not None:
            return JSONResponse({"status": "not for strangers"}, 403)
        status, body = controller.health()
        return JSONResponse(body, status)

    app = Starlette(routes=[Route("/health", health)], lifespan=lifespan)
    config = uvicorn.Config(app, host=HOST, port=port, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    server.run()
    if not failed:
        return 0
    if isinstance(failed[0], Refused):
        log.error("%s", failed[0])
        return EXIT_REFUSED
    log.critical("the fleet failed", exc_info=failed[0])
    return 1


def job_of(file: Path, policy: Deployment, runtime: Runtime) -> Job:
    """What every replica runs, but for its name and number."""
    key = os.environ[FLEET_KEY_ENV]
    environment = {
        FLEET_KEY_ENV: key,
        RUN_TOKEN_ENV: os.environ.get(RUN_TOKEN_ENV, ""),
        "OMP_NUM_THREADS": str(runtime.threads or max(1, int(cpus_of(policy)))),
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if runtime.key_env:
        environment[runtime.key_env] = key
    return Job(
        "",
        str(file.absolute()),
        place_of(file).read_text(encoding="utf-8"),
        version(),
        0,
        key,
        environment,
        LEASE_S,
        policy.gateway.drain_s,
    )


def cpus_of(policy: Deployment) -> float:
    threads = policy.runtime.threads if policy.runtime else None
    return policy.fleet.cpus or float(threads or 1)


def gpus_of(policy: Deployment) -> float:
    wants = policy.runtime is not None and policy.runtime.device == "cuda"
    return policy.fleet.gpus if policy.fleet.gpus is not None else float(wants)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fleet", description=__doc__)
    parser.add_argument("policy", type=Path, help="policy file")
    parser.add_argument("--port", type=int, required=True, help="of GET /health, on loopback")
    parser.add_argument("--book", type=Path, required=True, help="discovery file to write")
    parser.add_argument("--address", default="auto", help="of the Ray cluster")
    parser.add_argument(
        "--gateway", action="append", default=[], metavar="URL", help="a gateway; repeatable"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
