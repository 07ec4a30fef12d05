"""The policy file that an arm is started by: what is judged, on ports and in folders of its own.

Knows what of a policy names a place; what decides answers and their speed stays as it is.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policies.patching import Configured

_FREE_PORT = "tcp://127.0.0.1:0"


def write_policy(configured: Configured, folder: Path) -> Path:
    """Writes it into the folder, which the arm may fill, too."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "policy.yaml"
    data = placed(configured.data, configured.file.absolute().parent, folder)
    file.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
    return file


def placed(data: Mapping[str, Any], beside: Path, folder: Path) -> dict[str, Any]:
    """A policy's mapping with paths absolute, ports free, and nothing shared with other arms.

    `beside` is the folder of the policy file, `folder` the arm's own.
    """
    own = copy.deepcopy(dict(data))
    gateway = own.setdefault("gateway", {})
    gateway |= {"port": 0, "reload": "signal"}
    gateway.pop("store", None)  # limits and sessions of several gateways
    runtime = own.get("runtime")
    if runtime is not None:
        _place_runtime(runtime, beside, folder)
    for part in ("upstreams", "discovery"):
        for entry in own.get(part, ()):
            for name in ("tokenizer", "file"):
                if name in entry:
                    entry[name] = str(beside / entry[name])
    return own


def _place_runtime(runtime: dict[str, Any], beside: Path, folder: Path) -> None:
    for owner, name in (
        (runtime, "model"),
        (runtime, "adapters"),
        (runtime.get("speculation"), "draft"),
    ):
        if isinstance(owner, dict) and isinstance(owner.get(name), str):
            found = beside / Path(owner[name]).expanduser()
            if found.is_dir():  # else it is `pocket`, or a hub name
                owner[name] = str(found)
    disk = (runtime.get("tiers") or {}).get("disk")
    if disk is not None:
        disk["path"] = str(folder / "disk")
    if isinstance(runtime.get("kv_events"), dict):
        runtime["kv_events"] |= {"endpoint": _FREE_PORT, "replay_endpoint": _FREE_PORT}
