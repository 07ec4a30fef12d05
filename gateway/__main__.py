"""`python -m gateway POLICY`: one gateway process. Started by `headgate serve`, or by hand."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gateway.app import create_app
from gateway.edge import Live, build
from gateway.listener import BACKLOG, Server, adopt, configure
from gateway.reload import Origin, Reload, begin
from gateway.siblings import NotPrivate, Siblings
from gateway.state import open_state
from policies.enabling import news
from policies.load import PolicyError
from policies.open_files import take_files

log = logging.getLogger("headgate.gateway")

PRIVATE_HOST = "127.0.0.1"  # where the supervisor asks one of several gateways

GC_OBJECTS = 10_000  # that may come to be before a collection of the young ones


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; 0 after a drain, 2 when it could not begin."""
    options = parse_options(arguments)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    origin = Origin(
        options.policy, options.replica, alone=options.private is None, fleet=options.fleet
    )
    try:
        first = begin(origin, options.started)
        policy, replicas = first.policy, first.replicas
        state = open_state(policy.gateway, os.environ, options.policy.absolute().parent)
    except PolicyError as error:
        print(error, file=sys.stderr)
        return 2
    if not replicas and not policy.discovery:
        print("no replica: give --replica URL, or upstreams in the policy", file=sys.stderr)
        return 2
    settings = policy.gateway
    if options.siblings is not None:
        try:
            name = options.process if options.process is not None else os.getpid()
            siblings = Siblings(options.siblings, str(name))
        except (NotPrivate, OSError) as error:
            print(f"--siblings: {error}", file=sys.stderr)
            return 2
        state = replace(state, siblings=siblings)
    live = Live(build(policy, replicas, state=state))
    live.gated, live.refused = first.gated, first.refused
    if first.refused is not None:
        log.warning("begins by the policy that was taken last, not by the file: %s", first.refused)
    for row in news(first.gated):
        log.warning("%s: %s  %s", *row)
    port = settings.port if options.port is None else options.port
    reload = Reload(origin, live, lambda adopted: adopt(config, adopted), options.started)
    config = configure(create_app(live, reload), settings, host=settings.host, port=port)
    collect_seldom()
    take_files()
    if options.private is None:
        Server(config, live).run()
    else:
        sockets = (listen(settings.host, port, share=True), listen(PRIVATE_HOST, options.private))
        Server(config, live).run(list(sockets))
    return 0


def collect_seldom() -> None:
    """What is loaded by now stays, and a request leaves few cycles: a collection each 700 objects,
    over everything, took a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS)


def listen(host: str, port: int, *, share: bool = False) -> socket.socket:
    """A listening socket; with `share`, the kernel spreads connections over all that listen."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return socket.create_server(address, family=family, backlog=BACKLOG, reuse_port=share)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    parser.add_argument("policy", type=Path, help="policy file")
    parser.add_argument(
        "--port", type=int, default=None, help="instead of the policy's; 0: a free one"
    )
    parser.add_argument(
        "--private",
        type=int,
        default=None,
        metavar="PORT",
        help="this is one of several gateways that share --port, and listens here for itself too",
    )
    parser.add_argument(
        "--siblings",
        type=Path,
        metavar="FOLDER",
        help="of this user alone, in which several gateways ask each other for traces, receipts "
        "and metrics",
    )
    parser.add_argument(
        "--process",
        type=int,
        metavar="NUMBER",
        help="of this one among its siblings, from 0: a label of its metrics, the same after a "
        "restart; without it, its process id",
    )
    parser.add_argument(
        "--started",
        type=Path,
        metavar="FILE",
        help="copy of the policy that the workers run by, and this one where POLICY, edited since, "
        "takes a restart of all; says what was reloaded last",
    )
    parser.add_argument(
        "--replica",
        action="append",
        default=[],
        metavar="URL",
        help="a worker of our own; repeatable",
    )
    parser.add_argument(
        "--fleet",
        type=Path,
        metavar="FILE",
        help="discovery file of workers of our own that come and go",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
