"""What this machine is: cores, memory, processor, cards, who holds a port. Reads /proc."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

_CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
_CGROUP_MEMORY_NOW = Path("/sys/fs/cgroup/memory.current")
# Instructions that decide how fast a model runs on a CPU.
_TELLING_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cores() -> int:
    """Cores that this process may use: affinity and the container's quota, at least one."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        count = os.cpu_count() or 1
    quota, _, period = _text(_CGROUP_CPU).strip().partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        count = min(count, max(1, int(quota) // int(period)))
    return max(1, count)


def memory_bytes() -> tuple[int, int] | None:
    """Total and available memory, the container's limit included; None where it cannot be read."""
    fields = dict(
        line.split(":", 1) for line in _text(Path("/proc/meminfo")).splitlines() if ":" in line
    )
    try:
        total = int(fields["MemTotal"].split()[0]) * 1024
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (KeyError, ValueError, IndexError):
        return None
    limit = _text(_CGROUP_MEMORY).strip()
    if limit.isdecimal() and int(limit) < total:
        used = _text(_CGROUP_MEMORY_NOW).strip()
        total = int(limit)
        available = min(available, max(0, total - (int(used) if used.isdecimal() else 0)))
    return total, available


def processor() -> tuple[str, tuple[str, ...]]:
    """The processor's name, and those of its instruction sets that decide a model's speed."""
    fields: dict[str, str] = {}
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    has = set(fields.get("flags", fields.get("Features", "")).split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(flag for flag in _TELLING_FLAGS if flag in has)


def graphics_cards() -> list[str]:
    """Name and driver of each NVIDIA card, as the driver's own program tells them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        asked = subprocess.run(
            [program, "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.replace(", ", ", driver ") for line in asked.stdout.splitlines() if line.strip()]


# ---- ports --------------------------------------------------------------------------------------


class PortError(Exception):
    """A port that cannot be listened on; the text says why and, if it can be known, who has it."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises PortError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PortError(f"{host} cannot be used here: {error.strerror}") from None
    try:
        bound.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: after a restart
        bound.bind(address)
        bound.listen(1)
    except OSError as error:
        bound.close()
        raise PortError(_why(host, port, error)) from None
    return bound


def reserve(host: str, port: int) -> socket.socket:
    """A bound socket that keeps a free port for processes which share it by SO_REUSEPORT.

    It does not listen: the kernel spreads connections over those that do. Raises PortError.
    """
    with bind(host, port) as probe:  # fails also where others share the port
        family, address = probe.family, probe.getsockname()
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as error:
        held.close()
        raise PortError(_why(host, port, error)) from None
    return held


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        holder = port_holder(port)
        return f"{address(host, port)} is taken" + (f" by {holder}" if holder else "")
    if error.errno == errno.EACCES:
        return f"{address(host, port)} needs privileges: ports below 1024 are reserved"
    return f"{address(host, port)} cannot be used: {error.strerror}"


def address(host: str, port: int) -> str:
    """`127.0.0.1:8080`, `[::1]:8080`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Distinct free ports; held together, then let go for the programs that will take them."""
    with ExitStack() as held:
        return [held.enter_context(bind(host, 0)).getsockname()[1] for _ in range(count)]


def port_holder(port: int) -> str | None:
    """`python3 (process 4242)` for the listener of a port, where /proc shows it to us."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _text(Path(table)).splitlines()[1:]:
            cells = line.split()
            # Linux, Documentation/networking/proc_net_tcp.rst: 1 local address, 3 state, 9 inode
            if len(cells) > 9 and cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{cells[9]}]")
    return _process_with(inodes) if inodes else None


def _process_with(sockets: set[str]) -> str | None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [str(entry.readlink()) for entry in (process / "fd").iterdir()]
        except OSError:  # ended meanwhile, or another user's
            continue
        if sockets.intersection(links):
            name = _text(process / "comm").strip()
            return f"{name} (process {process.name})"
    return None
