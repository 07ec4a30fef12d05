"""Where each service of a compose file lives on one machine: its ports, its folders.

A container has a network and a file system of its own; here `redis:6379` becomes a port of
loopback and `/etc/headgate` a folder, in commands, environment and files that are mounted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from command.machine import bind, free_ports
from deploy.local.compose import ComposeError, Mount, Service

LOOPBACK = "127.0.0.1"
_OWN_HOST = r"(?:127\.0\.0\.1|localhost|0\.0\.0\.0|\*|)"
_TEXT_BYTES_MAX = 2**20


@dataclass(frozen=True, slots=True)
class Places:
    """`ports`: of each service, as it knows them -> as this machine does."""

    folder: Path
    ports: Mapping[str, Mapping[int, int]]

    @classmethod
    def of(cls, services: Sequence[Service], folder: Path) -> Places:
        """Published ports stay, 0 and the others become free ones. Raises PortError for one that
        is taken."""
        for service in services:
            for port in service.published.values():
                bind(LOOPBACK, port).close()
        inner = [(one.name, port) for one in services for port in one.ports]
        free = iter(free_ports(len(inner)))
        ports: dict[str, dict[int, int]] = {one.name: {} for one in services}
        published = {one.name: one.published for one in services}
        for name, port in inner:
            taken = next(free)
            ports[name][port] = published[name].get(port) or taken
        return cls(folder, ports)

    def url(self, name: str) -> str:
        """Of a service's first port."""
        return f"http://{LOOPBACK}:{next(iter(self.ports[name].values()))}"

    def path(self, service: Service, mount: Mount) -> Path:
        if mount.is_volume:
            return self.folder / "volumes" / mount.source
        return self.folder / service.name / mount.target.lstrip("/")

    def words(self, service: Service) -> Callable[[str], str]:
        """A function that puts this machine's addresses and paths for the service's into a text."""
        addresses = {
            f"{name}:{port}": f"{LOOPBACK}:{ours}"
            for name, ports in self.ports.items()
            for port, ours in ports.items()
        }
        paths = {mount.target: str(self.path(service, mount)) for mount in service.mounts}
        paths |= {path: str(self.folder / service.name / path[1:]) for path in service.scratch}
        own = self.ports[service.name]
        pattern = re.compile(
            "|".join(
                [
                    rf"(?<![\w.-])(?P<address>{_either(addresses)})(?!\d)",
                    rf"(?<![\w.\]-]){_OWN_HOST}:(?P<own>{_either(map(str, own))})(?!\d)",
                    rf"(?<![\w.-])(?P<path>{_either(paths)})(?![\w.-])",
                    r"(?<![\d.])(?P<any>0\.0\.0\.0)(?![\d.])",
                ]
            )
        )

        def put(found: re.Match[str]) -> str:
            if found["address"]:
                return addresses[found["address"]]
            if found["own"]:
                return f"{LOOPBACK}:{own[int(found['own'])]}"
            return paths[found["path"]] if found["path"] else LOOPBACK

        return lambda text: pattern.sub(put, text)

    def argv(self, service: Service, told: Sequence[str]) -> tuple[str, ...]:
        """A command of the service; a port of its own may be an argument by itself."""
        own = {str(port): str(ours) for port, ours in self.ports[service.name].items()}
        put = self.words(service)
        return tuple(own.get(word) or put(word) for word in told)

    def settle(self, service: Service, beside: Path) -> None:
        """Makes the folders that the service expects: what it mounts lies beside the compose
        file, texts with this machine's words in them. Raises ComposeError."""
        put = self.words(service)
        for path in service.scratch:
            (self.folder / service.name / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        for mount in service.mounts:
            there = self.path(service, mount)
            if mount.is_volume:
                there.mkdir(parents=True, exist_ok=True)
                continue
            source = (beside / Path(mount.source).expanduser()).resolve()
            if not source.exists():
                raise ComposeError(f"{service.name} mounts {source}, which does not exist")
            there.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file() and source.stat().st_size <= _TEXT_BYTES_MAX:
                there.write_text(put(_text(source, service)), encoding="utf-8")
            else:
                there.symlink_to(source)


def _text(file: Path, service: Service) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ComposeError(f"{service.name} mounts {file}, which cannot be read: {why}") from None


def _either(words: Mapping[str, str] | map[str]) -> str:
    """A pattern for any of these, longer ones first; for none of none."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)"
