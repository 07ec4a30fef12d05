"""What a worker serves, as one number: a hash over everything that can change its answers.

Eight leaves (weights, draft, tokenizer, template, engine, device, configuration, arithmetic), each
the hash of its facts as canonical JSON; the root is a hash over the leaves. `policies.model_facts`
knows files and versions, this module the device, the policy, and what was chosen when the model was
loaded. docs/fingerprint.md tells how to recompute it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from policies.model_facts import Facts, engine_facts, template_facts, tokenizer_facts
from policies.schema import Runtime
from policies.side import SHORT_DIGITS, leaf as leaf_of
from runtime import native, processor

if TYPE_CHECKING:
    from runtime.model import Model

LEAVES = (
    "weights", "draft", "tokenizer", "template", "engine", "device", "configuration", "arithmetic",
)  # fmt: skip
# Where the weights lie says nothing about them, their leaf says what they are; and who listens to
# block events changes no answer.
_PLACES = {"model", "revision", "kv_events"}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`leaves` has a digest for each of LEAVES, None where there is nothing: no draft model."""

    root: str
    leaves: Mapping[str, str | None]
    facts: Mapping[str, Facts | None]

    @property
    def short(self) -> str:
        """The `system_fingerprint` of every answer."""
        return f"fp_{self.root[:SHORT_DIGITS]}"

    def payload(self) -> dict[str, Any]:
        """The body of GET /v1/fingerprint."""
        return {
            "object": "fingerprint",
            "system_fingerprint": self.short,
            "root": self.root,
            "leaves": dict(self.leaves),
            "facts": dict(self.facts),
        }


def combine(facts: Mapping[str, Facts | None]) -> Fingerprint:
    """The hash tree over the facts of all LEAVES. No leaf can pass for another, or for the root."""
    leaves: dict[str, str | None] = {}
    root = hashlib.sha256(b"headgate fingerprint root 2\0")
    for name in LEAVES:
        known = facts[name]
        leaves[name] = leaf = None if known is None else leaf_of(name, known)
        root.update(name.encode() + (b"\0" if leaf is None else b"\1" + bytes.fromhex(leaf)))
    return Fingerprint(root.hexdigest(), leaves, {name: facts[name] for name in LEAVES})


def take(
    folder: Path,
    weights: Facts,
    runtime: Runtime,
    device: torch.device,
    *,
    arithmetic: Facts,
    adapters: Mapping[str, str] = MappingProxyType({}),
    draft: Facts | None = None,
) -> Fingerprint:
    """The fingerprint of a model folder as this policy serves it here; `weights` and `draft`, where
    there is one, are of `read_weights`, `arithmetic` of `arithmetic_facts`.

    Raises TokenizerUnusable for files that do not parse.
    """
    configuration = {
        name: value
        for name, value in runtime.model_dump(mode="json").items()
        if name not in _PLACES
    }
    if runtime.tiers is not None and runtime.tiers.disk is not None:
        del configuration["tiers"]["disk"]["path"]
    del configuration["speculation"]["draft"]  # its leaf says what it is
    configuration["adapters"] = dict(adapters)  # what they are, not where they lie
    return combine(
        {
            "weights": weights,
            "draft": draft,
            "tokenizer": tokenizer_facts(folder),
            "template": template_facts(folder),
            "engine": engine_facts(),
            "device": device_facts(device),
            "configuration": configuration,
            "arithmetic": arithmetic,
        }
    )


# ---- leaves -------------------------------------------------------------------------------------


def device_facts(device: torch.device) -> Facts:
    """What computes: the same weights round differently on another processor."""
    if device.type == "cuda":
        name, detail = torch.cuda.get_device_name(device), torch.version.cuda
    else:
        name, detail = processor.name(), torch.backends.cpu.get_cpu_capability()
    return {"type": device.type, "name": name, "detail": detail, "torch": torch.__version__}


def arithmetic_facts(model: Model) -> Facts:
    """In which of several right ways sums are made here: each rounds in an order of its own.

    What a policy leaves open is decided by measurement (`runtime.choices`), by how many threads
    there are, and by whether our own code could be compiled.
    """
    layers: dict[str, dict[str, int]] = {}
    for (rows, features, way), count in sorted(model.weights.shapes.items()):
        layers.setdefault(f"{rows}x{features}", {})[way] = count
    compiled = any(kernel is not None for kernel in model.kernels)
    return {
        "activations": str(model.dtype).removeprefix("torch."),
        "layers": layers,
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "attention": "compiled" if compiled else "torch",
        "step": "torch" if model.decoder is None else "compiled",
        "compiler": native.compiler() if model.library is not None else None,
    }


def known_devices() -> dict[str, Facts]:
    """The facts by the names that a policy may give a device, those that there are."""
    facts = {"cpu": device_facts(torch.device("cpu"))}
    if torch.cuda.is_available():
        facts["cuda"] = device_facts(torch.device("cuda"))
    return facts | {"auto": facts.get("cuda", facts["cpu"])}
