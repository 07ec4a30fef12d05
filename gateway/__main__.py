"""`python -m gateway POLICY`: one gateway process. Started by `headgate serve`, or by hand."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway.app import create_app
from gateway.edge import Live, build
from gateway.listener import Server, configure
from gateway.replica import replicas_of
from gateway.state import StoreMissing, open_state
from policies.load import PolicyError, key_problems, load, resolve_discovery, with_environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; 0 after a drain, 2 when it could not begin."""
    options = parse_options(arguments)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        policy = resolve_discovery(options.policy, with_environment(load(options.policy)))
        if problems := key_problems(options.policy, policy):
            raise PolicyError(*problems)
        replicas = replicas_of(policy, options.replica, os.environ)
        state = open_state(policy.gateway, os.environ, options.policy.absolute().parent)
    except (PolicyError, StoreMissing) as error:
        print(error, file=sys.stderr)
        return 2
    if not replicas and not policy.discovery:
        print("no replica: give --replica URL, or upstreams in the policy", file=sys.stderr)
        return 2
    settings = policy.gateway
    live = Live(build(policy, replicas, state=state))
    port = settings.port if options.port is None else options.port
    config = configure(create_app(live), settings, host=settings.host, port=port)
    Server(config, live).run()
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    parser.add_argument("policy", type=Path, help="policy file")
    parser.add_argument(
        "--port", type=int, default=None, help="instead of the policy's; 0: a free one"
    )
    parser.add_argument(
        "--replica",
        action="append",
        default=[],
        metavar="URL",
        help="a worker of our own; repeatable",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
