"""`python -m deploy.local [FILE]`: what compose.yaml runs, as processes on this machine.

Commands, files, environment, health checks and order are read from the compose file, keys from the
`.env` beside it; what has a profile is left out. Ctrl-C drains: the edge first, then the gateways,
then what is behind them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from command.machine import PortError
from command.processes import Program
from command.run_folder import own_folder
from command.screen import Screen, columns
from command.supervisor import Supervisor
from deploy import keys
from deploy.local.compose import ComposeError, Service, read
from deploy.local.places import LOOPBACK, Places
from policies.children import package_environment

KEY = "HEADGATE_KEY"
COMPOSE = Path(__file__).resolve().parents[2] / "compose.yaml"
# What a container image has on its path, and Debian not on that of a user.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_PACKAGES = {"redis-cli": "redis-tools"}  # Debian's, where they have another name


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until Ctrl-C; 0 after a drain, 1 where something could not start."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=COMPOSE, help="a compose file")
    options = parser.parse_args(arguments)
    secrets = options.file.resolve().parent / ".env"
    try:
        environ = keys.settled(secrets, os.environ)
    except OSError as error:
        print(f"no keys: {error}; set {', '.join(keys.NAMES)} instead", file=sys.stderr)
        return 1
    screen = Screen()
    # Short, because the path of a local socket may have no more than 107 characters.
    with own_folder("hg-") as folder:
        try:
            services = read(options.file, environ)
            places = Places.of(services, folder)
            programs = [program_of(service, places) for service in services]
            for service in services:
                places.settle(service, options.file.resolve().parent)
        except (ComposeError, PortError) as error:
            print(error, file=sys.stderr)
            return 1
        screen.say(f"{options.file.name} as processes", *columns(opening(programs)))
        supervisor = Supervisor(programs, screen)
        url = places.url(services[-1].name)

        def announce(took_s: float) -> None:
            screen.say(
                f"ready in {took_s:.1f} s", "",
                f"  {url}/v1", f"  {url}/console   asks for HEADGATE_ADMIN_KEY", "",
                *([] if os.environ.get(KEY) else [f"  . {shlex.quote(str(secrets))}"]),
                f"  export HEADGATE_API_KEY=${KEY}",
                f"  curl {url}/v1/models -H \"Authorization: Bearer $HEADGATE_API_KEY\"",
                "", "Ctrl-C drains and ends",
            )  # fmt: skip

        return asyncio.run(supervisor.run(announce))


def opening(programs: Sequence[Program]) -> list[tuple[str, str, str]]:
    """What runs where, the front first."""
    return [(one.name, f"{one.host}:{one.port}", Path(one.argv[0]).name) for one in programs[::-1]]


def program_of(service: Service, places: Places) -> Program:
    """A service as a process. Raises ComposeError for a program that is not installed."""
    put = places.words(service)
    check = service.check
    return Program(
        service.name,
        _found(places.argv(service, service.argv)),
        LOOPBACK,
        next(iter(places.ports[service.name].values())),
        package_environment() | {name: put(value) for name, value in service.environment.items()},
        drain_s=service.grace_s,
        probe=_found(places.argv(service, check.argv)) if check else None,
        probe_every_s=check.every_s if check else 1.0,
        waits_for=tuple(name for name, well in service.needs.items() if well),
        rests_on=tuple(service.needs),
        stop=signal.Signals[service.stop_signal],
    )


def _found(argv: Sequence[str]) -> tuple[str, ...]:
    """With the program's path on this machine; an image's python is ours."""
    name, *rest = argv
    if name in ("python", "python3"):
        return (sys.executable, *rest)
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SBIN}")
    if path is None:
        package = _PACKAGES.get(name, name)
        raise ComposeError(f"{name} is not installed here: apt-get install {package}, or as your "
                           "system has it")  # fmt: skip
    return (path, *rest)


if __name__ == "__main__":
    sys.exit(main())
