"""The leaves of a configuration, and of a hypothesis: what a verdict about them is bound to.

Knows files and the policy's fields; which leaf spoils what, `effects.py` says. docs/binding.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.tokenizer_files import TokenizerUnusable
from policies.devices import Devices, DevicesUnknown, devices
from policies.evidence import NoEvidence, find_source
from policies.load import read_yaml
from policies.model_facts import (
    Facts,
    digest_files,
    engine_facts,
    kept_digests,
    read_weights,
    source_digest,
    template_facts,
    tokenizer_facts,
    version,
)
from policies.model_folder import (
    ModelError,
    find_draft,
    find_model,
    hub_folder,
    tokenizer_folder,
)
from policies.schema import Deployment, Discovery, Gateway, Runtime, Upstream
from policies.side import Side, leaf

if TYPE_CHECKING:
    from policies.hypothesis import Hypothesis

# `runtime`: a field speaks of the batches that answers are computed in (BATCHING), has a leaf of
# its own, or says where something lies or who is told (ELSEWHERE); any other speaks of answers.
BATCHING = (
    "workers", "threads", "kv_tokens", "tiers", "step_tokens", "tpot_ms", "max_sequences",
    "max_waiting",
)  # fmt: skip
ELSEWHERE = ("model", "revision", "served_name", "device", "adapters", "kv_events",
             "key_env")  # fmt: skip

# `gateway`: fields with a leaf of their own, and those that change no answer and no time of one.
OWN = ("trim", "response_cache", "routing", "tiers")
SCHEDULING = ("running_per_replica", "max_in_flight")
PLACES = (
    "host", "port", "max_body_bytes", "body_timeout_s", "keep_alive_s", "drain_s", "reload",
    "secret_env", "store", "tenants", "record", "admin",
)  # fmt: skip
TARGETS = ("ttft_ms", "tpot_ms")


class Unknown(Exception):
    """A leaf that cannot be told here, and why."""


@dataclass(slots=True)
class Binder:
    """Takes sides of policies that lie beside one file; reads each weight file once."""

    file: Path
    devices: Callable[[], Devices] = devices
    kept: Path | None = None  # where digests of large files are kept; default: the user's cache
    _weights: dict[Path, Facts] = field(default_factory=dict)

    def side(self, deployment: Deployment) -> Side:
        """Raises Unknown."""
        try:
            facts = edge_facts(self._beside, deployment)
            if deployment.runtime is not None:
                facts |= self._engine(deployment.runtime)
        except (ModelError, TokenizerUnusable, DevicesUnknown) as error:
            raise Unknown(str(error)) from None
        except OSError as error:
            raise Unknown(f"{error.filename}: {error.strerror}") from None
        return Side.of(facts)

    @property
    def _beside(self) -> Path:
        return self.file.absolute().parent

    def _engine(self, runtime: Runtime) -> dict[str, Any]:
        model = _here(find_model(runtime.model, self._beside), runtime.revision)
        draft = runtime.speculation.draft
        guesser = None if draft is None else _here(find_draft(draft, self._beside), None)
        said = runtime.model_dump(mode="json")
        if said["tiers"] and said["tiers"]["disk"]:
            del said["tiers"]["disk"]["path"]
        del said["speculation"]["draft"]  # its leaf says what it is
        known = self.devices()
        if runtime.device not in known:
            raise Unknown(f"there is no device {runtime.device!r} here")
        return {
            "weights": self._read(model),
            "draft": self._read(guesser) if guesser else None,
            "tokenizer": tokenizer_facts(model),
            "template": template_facts(model),
            "adapters": self._adapters(runtime.adapters),
            "engine": engine_facts(),
            "device": known[runtime.device],
            "numerics": {name: said[name] for name in numerics(Runtime)},
            "batching": {name: said[name] for name in BATCHING},
        }

    def _read(self, folder: Path) -> Facts:
        if folder not in self._weights:
            self._weights[folder] = read_weights(folder, self.kept)
        return self._weights[folder]

    def _adapters(self, name: str | None) -> Facts | None:
        if name is None:
            return None
        folder = self._beside / Path(name).expanduser()
        return files_facts(folder, self.kept)


def numerics(model: type[Runtime]) -> tuple[str, ...]:
    """Fields of the runtime that change answers, and any to come: nothing is left unbound."""
    return tuple(name for name in model.model_fields if name not in (*BATCHING, *ELSEWHERE))


def edge_source() -> Facts:
    """What the gateway itself is."""
    return {"headgate": version("headgate"), "source": source_digest(("gateway",))}


def edge_facts(beside: Path, deployment: Deployment, source: Facts | None = None) -> dict[str, Any]:
    """Leaf -> facts of the gateway's part: what it does to prompts, where it sends them, when."""
    said = deployment.gateway.model_dump(mode="json")
    tiers = said["tiers"]
    del said["routing"]["receipts"]
    return {
        "edge": source or edge_source(),
        "trim": said["trim"],
        "response_cache": said["response_cache"],
        "routing": said["routing"],
        "slo": {name: {one: tier[one] for one in TARGETS} for name, tier in tiers.items()},
        "scheduling": {
            **{name: said[name] for name in SCHEDULING},
            "tiers": {
                name: {one: tier[one] for one in tier if one not in TARGETS}
                for name, tier in tiers.items()
            },
        },
        "transport": {name: said[name] for name in transport(Gateway)},
        "upstreams": _upstreams(beside, deployment) or None,
    }


def transport(model: type[Gateway]) -> tuple[str, ...]:
    """Fields of the gateway with no other place: retries, hedging, timeouts, and any to come."""
    placed = {*OWN, *SCHEDULING, *PLACES}
    return tuple(name for name in model.model_fields if name not in placed)


def _upstreams(beside: Path, deployment: Deployment) -> list[dict[str, Any]]:
    """Servers elsewhere are known by their address alone; and how their prompts are counted."""
    found = []
    listed: tuple[Upstream | Discovery, ...] = (*deployment.upstreams, *deployment.discovery)
    for one in listed:
        said = one.model_dump(mode="json", exclude={"api_key_env", "drain", "every_s"})
        if isinstance(one, Discovery) and one.kv_events is None:
            del said["kv_events"]  # a field that was not there when others were judged
        if one.tokenizer is not None:
            folder = tokenizer_folder(one.tokenizer, beside) or beside / one.tokenizer
            said["tokenizer"] = [tokenizer_facts(folder), template_facts(folder)]
        found.append(said)
    return found


def _here(model: Path | str, revision: str | None) -> Path:
    folder = model if isinstance(model, Path) else hub_folder(model, revision)
    if folder is None:
        raise Unknown(f"what {model} is cannot be told before it has been fetched from the hub")
    return folder


def files_facts(folder: Path, kept: Path | None = None) -> Facts:
    """SHA-256 of each file below a folder, or of the one file, by name. Raises OSError."""
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in files]
    else:
        files, names = [folder], [folder.name]
    return dict(zip(names, digest_files(files, kept or kept_digests()), strict=True))


# ---- the hypothesis -----------------------------------------------------------------------------


def spec_side(file: str | Path, hypothesis: Hypothesis) -> Side:
    """What was asked, and on what: the hypothesis, each suite with its scorers and judges, each
    replay. Raises Unknown where one is not there, PolicyError for a suite that is no YAML."""
    said = hypothesis.model_dump(
        mode="json",
        # The sides are leaves of their own; who asked, and what comes later, is no evidence.
        exclude={"metadata", "baseline", "candidate", "rollout", "validity"},
    )
    said["min_affected_pairs"] = hypothesis.validity.min_affected_pairs
    leaves = {"hypothesis": leaf("hypothesis", said)}
    claimed = (hypothesis.source_of(one) for one in hypothesis.claims)
    for source in dict.fromkeys((*hypothesis.sources, *claimed)):
        try:
            found = find_source(source, file)
            facts = {source: files_facts(found)} if _is_replay(source) else _suite(source, found)
        except NoEvidence as error:
            raise Unknown(str(error)) from None
        except OSError as error:
            raise Unknown(f"{error.filename}: {error.strerror}") from None
        leaves |= {name: leaf(name, one) for name, one in facts.items() if one}
    return Side.over(leaves)


def _is_replay(source: str) -> bool:
    return source.startswith("replay:")


def _suite(source: str, file: Path) -> Mapping[str, Any]:
    """`suite:NAME` are the rows and what is asked; `scorers:NAME` and `judge:NAME` who says how
    good the answers are."""
    data, _, _ = read_yaml(str(file))
    said = dict(data) if isinstance(data, dict) else {}
    listed = said.pop("scorers", None)
    scorers = listed if isinstance(listed, list) else [listed]
    judges = [one for one in scorers if isinstance(one, dict) and one.get("kind") == "judge"]
    rows = said.pop("data", None)
    if isinstance(rows, str):
        said["rows"] = list(files_facts(file.absolute().parent / rows).values())
    name = source.partition(":")[2]
    return {
        source: said,
        f"scorers:{name}": {
            "scorers": [one for one in scorers if one not in judges],
            "source": source_digest(("evals/scorers",)),
        },
        f"judge:{name}": judges,
    }
