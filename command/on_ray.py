"""`headgate serve --on ray`: which programs that takes. Knows no Ray; `fleet/` does."""

from __future__ import annotations

import importlib.util
import json
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path

from command.processes import Program
from policies import as_started
from policies.load import FLEET_KEY_ENV, worker_key
from policies.schema import Deployment

_HOST = "127.0.0.1"
# After the drain of all replicas, before SIGKILL: theirs, and Ray's own.
_GRACE_S = 20.0


@dataclass(frozen=True, slots=True)
class OnRay:
    """Where replicas run instead of on this machine."""

    address: str  # of the Ray cluster
    folder: Path  # of this run, for the list of replicas
    key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    @property
    def book(self) -> Path:
        return self.folder / "replicas.yaml"

    def environment(self, deployment: Deployment) -> dict[str, str]:
        """For all programs: the key that workers ask for, the policy's if it has one."""
        return {FLEET_KEY_ENV: worker_key(deployment.runtime) or self.key}

    def program(
        self,
        policy: Path,
        deployment: Deployment,
        port: int,
        gateways: list[str],
        environment: dict[str, str],
    ) -> Program:
        """The program that keeps the fleet, in each of its lives by the policy as it is now. The
        list that gateways read is there before them."""
        copy = as_started.copied(policy, self.folder)
        self.book.write_text(json.dumps({"replicas": []}) + "\n", encoding="utf-8")
        asked = [part for url in gateways for part in ("--gateway", url)]
        return Program(
            "fleet",
            (
                sys.executable, "-P", "-m", "fleet", str(policy), "--port", str(port),
                "--book", str(self.book), "--address", self.address, *asked,
            ),
            _HOST,
            port,
            environment | as_started.environment(policy, copy),
            drain_s=deployment.gateway.drain_s,
            grace_s=_GRACE_S,
            refusal=3,  # fleet/__main__.py
            fact="fleet",
        )  # fmt: skip


def why_not(deployment: Deployment) -> str | None:
    """What keeps a policy from being served on Ray."""
    if deployment.runtime is None:
        return "there is nothing to run on Ray: the policy has no `runtime`"
    if deployment.runtime.kv_events is not None:
        return (
            "on Ray no gateway hears `runtime.kv_events`, which workers tell on their own machine"
        )
    if importlib.util.find_spec("ray") is None:
        return "Ray is not installed: pip install 'headgate[ray]'"
    return None
