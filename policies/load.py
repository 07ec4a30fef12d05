"""File -> policy, or PolicyError: `file:line:col  path  problem; did you mean`, one line a problem.

Knows where files and the environment come in; `yaml_tree` reads YAML, `problems` explains.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from policies.as_started import place_of
from policies.discovery import Members
from policies.model_folder import (
    ModelError,
    find_draft,
    find_model,
    hub_folder,
    is_hub_name,
    refuse_large_draft,
    served_name,
    tokenizer_folder,
)
from policies.problems import Places, PolicyError, Problem, closest, dotted, explain
from policies.schema import Deployment, Runtime
from policies.slo import ADMIN_IS_CLIENT, tenants_with
from policies.yaml_tree import parse

if TYPE_CHECKING:
    from policies.hypothesis import Hypothesis
    from policies.suite import SuiteFile

__all__ = [
    "PolicyError",
    "Problem",
    "admin_problems",
    "guess_problems",
    "key_problems",
    "load",
    "load_hypothesis",
    "load_members",
    "load_suite_file",
    "load_whole",
    "package_problems",
    "port_of",
    "read_yaml",
    "resolve_adapters",
    "resolve_discovery",
    "resolve_draft",
    "resolve_folders",
    "resolve_model",
    "tier_problems",
    "with_environment",
    "worker_key",
]

FILE_BYTES_MAX = 256 * 2**10
PORT_VARIABLE = "HEADGATE_PORT"
# `headgate serve --on ray` gives one to all it starts: for workers, where the policy names none.
FLEET_KEY_ENV = "HEADGATE_FLEET_KEY"

_Model = TypeVar("_Model", bound=BaseModel)
_Path = tuple[str | int, ...]  # of a field


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy, and what was read of its file for it, once."""

    deployment: Deployment
    data: Any
    body: bytes


def load(path: str | Path) -> Deployment:
    """The policy in a file. Raises PolicyError with every problem that was found."""
    return load_whole(path).deployment


def load_whole(path: str | Path) -> Loaded:
    """The policy in a file, with what the file says. Raises PolicyError as `load`."""
    file = str(path)
    body = _bytes_of(file)
    data, places, problems = parse(file, _text_of(file, body))
    return Loaded(_validated(Deployment, file, data, places, problems), data, body)


def load_members(path: str | Path) -> Members:
    """The replicas in a discovery file. Raises PolicyError with every problem that was found."""
    return _load(Members, str(path))


def load_hypothesis(path: str | Path) -> Hypothesis:
    """The hypothesis in a file. Raises PolicyError with every problem that was found.

    Its policy files are read by `patching.variants`.
    """
    from policies.hypothesis import Hypothesis  # serving needs none

    return _load(Hypothesis, str(path))


def load_suite_file(path: str | Path) -> SuiteFile:
    """The suite in a file, without its rows. Raises PolicyError with every problem found."""
    from policies.suite import SuiteFile

    return _load(SuiteFile, str(path))


def resolve_discovery(policy: str | Path, deployment: Deployment) -> Deployment:
    """The policy with each `discovery[].file` absolute: it is relative to the policy file."""
    beside = Path(policy).absolute().parent
    found = tuple(
        entry.model_copy(update={"file": str(beside / entry.file)}) if entry.file else entry
        for entry in deployment.discovery
    )
    return deployment.model_copy(update={"discovery": found})


def resolve_model(policy: str | Path, runtime: Runtime) -> Path | str:
    """The folder of `runtime.model`, checked, or a hub name. Raises PolicyError at its line."""
    try:
        return find_model(runtime.model, Path(policy).absolute().parent)
    except ModelError as error:
        wrong = [(("runtime", "model"), str(error))]
        raise PolicyError(*at_fields(policy, wrong, error.suggestion)) from None


def resolve_adapters(policy: str | Path, runtime: Runtime) -> Path | None:
    """The folder of `runtime.adapters`, None without one. Raises PolicyError at its line."""
    if runtime.adapters is None:
        return None
    folder = Path(policy).absolute().parent / Path(runtime.adapters).expanduser()
    if folder.is_dir():
        return folder
    message = f"there is no folder {str(folder)!r}; give one with a subfolder for each adapter"
    raise PolicyError(*at_fields(policy, [(("runtime", "adapters"), message)]))


def resolve_draft(policy: str | Path, runtime: Runtime) -> Path | str | None:
    """The folder of `runtime.speculation.draft`, checked, or a hub name; None without one.

    Raises PolicyError at its line, also where it is no smaller than the model.
    """
    name = runtime.speculation.draft
    if name is None:
        return None
    beside = Path(policy).absolute().parent
    try:
        draft = find_draft(name, beside)
        refuse_large_draft(draft, find_model(runtime.model, beside))
    except ModelError as error:
        wrong = [(("runtime", "speculation", "draft"), str(error))]
        raise PolicyError(*at_fields(policy, wrong, error.suggestion)) from None
    return draft


def guess_problems(policy: str | Path, runtime: Runtime) -> list[Problem]:
    """Models under `runtime.speculation.models` that are not served, each at its line."""
    named = runtime.speculation.models
    if not named:
        return []
    adapters = resolve_adapters(policy, runtime)
    served = [served_name(runtime, resolve_model(policy, runtime))]
    served += sorted(one.name for one in adapters.iterdir() if one.is_dir()) if adapters else []
    problems = []
    for name in named:
        if name not in served:
            wrong = f"there is no model {name!r}; served: {', '.join(map(repr, served))}"
            path = ("runtime", "speculation", "models", name)
            problems += at_fields(policy, [(path, wrong)], closest(name, served))
    return problems


def tier_problems(
    policy: str | Path, deployment: Deployment, *, served_here: bool = False
) -> list[Problem]:
    """Tiers under `runtime.speculation.tiers` that no request can be of, each at its line.

    A file without `gateway` may be of a runtime behind another gateway, which has tiers of its own:
    it is judged only where it is `served_here`, with its gateway.
    """
    runtime, tiers = deployment.runtime, deployment.gateway.tiers
    if runtime is None or not (served_here or "gateway" in deployment.model_fields_set):
        return []
    problems = []
    for name in runtime.speculation.tiers:
        if name not in tiers:
            wrong = f"there is no tier {name!r}; expected one of {', '.join(tiers)}"
            path = ("runtime", "speculation", "tiers", name)
            problems += at_fields(policy, [(path, wrong)], closest(name, list(tiers)))
    return problems


def resolve_folders(policy: str | Path, deployment: Deployment) -> Deployment:
    """The policy with `runtime.tiers.disk.path` absolute: it is relative to the file.

    Raises PolicyError at its line.
    """
    runtime = deployment.runtime
    tiers = runtime.tiers if runtime is not None else None
    if runtime is None or tiers is None or tiers.disk is None:
        return deployment
    try:
        folder = Path(policy).absolute().parent / Path(tiers.disk.path).expanduser()
    except RuntimeError as error:  # ~nobody
        wrong = [(("runtime", "tiers", "disk", "path"), str(error))]
        raise PolicyError(*at_fields(policy, wrong)) from None
    disk = tiers.disk.model_copy(update={"path": str(folder)})
    tiers = tiers.model_copy(update={"disk": disk})
    runtime = runtime.model_copy(update={"tiers": tiers})
    return deployment.model_copy(update={"runtime": runtime})


def resolve_recording(policy: str | Path, deployment: Deployment) -> Deployment:
    """The policy with `gateway.record.path` absolute: it is relative to the policy file.

    Raises PolicyError at its line.
    """
    record = deployment.gateway.record
    if record is None:
        return deployment
    try:
        folder = Path(policy).absolute().parent / Path(record.path).expanduser()
    except RuntimeError as error:  # ~nobody
        wrong = [(("gateway", "record", "path"), str(error))]
        raise PolicyError(*at_fields(policy, wrong)) from None
    record = record.model_copy(update={"path": str(folder)})
    gateway = deployment.gateway.model_copy(update={"record": record})
    return deployment.model_copy(update={"gateway": gateway})


def resolve_tokenizers(policy: str | Path, deployment: Deployment) -> Deployment:
    """The policy with each `tokenizer` absolute: they are relative to the policy file.

    Raises PolicyError at the line of one that is none.
    """
    changed = {}
    for part in ("upstreams", "discovery"):
        entries = []
        for index, entry in enumerate(getattr(deployment, part)):
            if entry.tokenizer is not None:
                path = (part, index, "tokenizer")
                folder = _tokenizer_folder(policy, entry.tokenizer, path)
                entry = entry.model_copy(update={"tokenizer": str(folder)})
            entries.append(entry)
        changed[part] = tuple(entries)
    return deployment.model_copy(update=changed)


def _tokenizer_folder(policy: str | Path, name: str, path: _Path) -> Path:
    beside = Path(policy).absolute().parent
    if (found := tokenizer_folder(name, beside)) is not None:
        return found
    message = f"there is no file {str(beside / name / 'tokenizer.json')!r}"
    if is_hub_name(name):
        message += (
            f", and no tokenizer of {name!r} in this machine's cache of the hub: `hf download "
            f"{name} --include '*.json' '*.jinja'` puts it there"
        )
    raise PolicyError(*at_fields(policy, [(path, message)]))


def own_tokenizer(policy: str | Path, deployment: Deployment) -> Path | None:
    """The folder with our own workers' tokenizer; None where it is not in one yet: a model of the
    hub that this machine has not fetched. Raises PolicyError."""
    if deployment.runtime is None:
        return None
    model = resolve_model(policy, deployment.runtime)
    if isinstance(model, Path):
        return model
    folder = hub_folder(model, deployment.runtime.revision)
    return folder if folder is not None and (folder / "tokenizer.json").is_file() else None


# What a policy asks for -> the package that it takes, and the extra of ours that installs it.
_NEEDS = {
    ("gateway", "store"): ("hiredis", "redis"),
    ("gateway", "trim", "passages", "keep"): ("bm25s", "trim"),
}


def package_problems(
    policy: str | Path,
    deployment: Deployment,
    installed: Callable[[str], bool] = lambda package: find_spec(package) is not None,
) -> list[Problem]:
    """What the policy asks for and no installed package can do, each at its line."""
    wrong: list[tuple[_Path, str]] = []
    for path, (package, extra) in _NEEDS.items():
        value: Any = deployment
        for name in path:
            value = getattr(value, name, None)
        if value is not None and not installed(package):
            message = f"needs the package {package}: pip install 'headgate[{extra}]'"
            wrong.append((path, message))
    return at_fields(policy, wrong)


def key_problems(
    policy: str | Path, deployment: Deployment, environ: Mapping[str, str] = os.environ
) -> list[Problem]:
    """What is wrong with the secrets that the policy names by their variables, each at its line."""
    named: list[tuple[_Path, str | None]] = [
        (("upstreams", index, "api_key_env"), upstream.api_key_env)
        for index, upstream in enumerate(deployment.upstreams)
    ]
    named += [
        (("discovery", index, "api_key_env"), entry.api_key_env)
        for index, entry in enumerate(deployment.discovery)
    ]
    named += [
        (("gateway", "tenants", name, "key_env"), tenant.key_env)
        for name, tenant in deployment.gateway.tenants.items()
    ]
    if deployment.runtime is not None:
        named.append((("runtime", "key_env"), deployment.runtime.key_env))
    named.append((("gateway", "secret_env"), deployment.gateway.secret_env))
    named.append((("gateway", "admin", "key_env"), deployment.gateway.admin.key_env))
    if deployment.gateway.store is not None:
        password_env = deployment.gateway.store.password_env
        named.append((("gateway", "store", "password_env"), password_env))
    wrong: list[tuple[_Path, str]] = []
    for path, name in named:
        key = environ.get(name, "").strip() if name else None
        if key is None or (key and key.isascii() and key.isprintable()):
            continue
        why = "holds what no HTTP header can carry" if key else "is not set, or empty"
        wrong.append((path, f"the environment variable {name} {why}"))
    return [*at_fields(policy, wrong), *admin_problems(policy, deployment, environ)]


def admin_problems(
    policy: str | Path, deployment: Deployment, environ: Mapping[str, str] = os.environ
) -> list[Problem]:
    """The admin's key, where a client has it as well; nothing where it is not set."""
    name = deployment.gateway.admin.key_env
    key = environ.get(name, "").strip() if name else ""
    same = tenants_with(key, deployment.gateway.tenants, environ) if key else []
    why = f"the environment variable {name} holds the key of the tenant"
    what = f"{ADMIN_IS_CLIENT}; give it a key of its own: `headgate policy key` makes one"
    wrong: list[tuple[_Path, str]] = [
        (("gateway", "admin", "key_env"), f"{why} {tenant!r}, too: {what}") for tenant in same
    ]
    return at_fields(policy, wrong)


def worker_key(runtime: Runtime | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The key that workers ask for, where they do. Raises KeyError for one that is not set."""
    if runtime is None or runtime.key_env is None:
        return environ.get(FLEET_KEY_ENV) or None
    key = environ.get(runtime.key_env, "").strip()
    if not key:
        raise KeyError(runtime.key_env)
    return key


def with_environment(deployment: Deployment, environ: Mapping[str, str] = os.environ) -> Deployment:
    """The policy with what the environment overrides: its port. Raises PolicyError for junk."""
    port = port_of(environ)
    if port is None:
        return deployment
    gateway = deployment.gateway.model_copy(update={"port": port})
    return deployment.model_copy(update={"gateway": gateway})


def port_of(environ: Mapping[str, str] = os.environ) -> int | None:
    """HEADGATE_PORT, or None where it is not set or empty. Raises PolicyError for a junk value.

    For a Service named `headgate` Kubernetes puts `tcp://10.0.0.1:80` there, in each pod beside it:
    that is not said by anybody, and of another thing.
    """
    text = environ.get(PORT_VARIABLE, "").strip()
    if not text or text.startswith("tcp://"):
        return None
    if re.fullmatch("[0-9]{1,5}", text) is None or int(text) > 65535:
        raise PolicyError(
            Problem(PORT_VARIABLE, f"expected a port from 0 to 65535, got {text[:40]!r}")
        )
    return int(text)


def _load(model: type[_Model], file: str) -> _Model:
    return _validated(model, file, *read_yaml(file))


def _validated(
    model: type[_Model], file: str, data: Any, places: Places, problems: list[Problem]
) -> _Model:
    try:
        loaded = model.model_validate(data)
    except ValidationError as error:
        problems += explain(error, model, file, places)
    # A file of another kind: what its own fields would have to be is nobody's question.
    problems = [one for one in problems if one.path == "kind"] or problems
    if problems:
        raise PolicyError(*sorted(problems, key=_order))
    return loaded


def at_fields(
    policy: str | Path, wrong: Sequence[tuple[_Path, str]], suggestion: str | None = None
) -> list[Problem]:
    """What is wrong at each path, with its line: for these the file is read once more."""
    if not wrong:
        return []
    _, places, _ = read_yaml(str(policy))
    return [
        Problem(str(policy), message, places.of(path), dotted(path), suggestion)
        for path, message in wrong
    ]


def _order(problem: Problem) -> tuple[int, int]:
    return (problem.place.line, problem.place.column) if problem.place else (0, 0)


def read_yaml(file: str) -> tuple[Any, Places, list[Problem]]:
    """Values, places, and what was wrong already. Raises PolicyError."""
    return parse(file, _text_of(file, _bytes_of(file)))


def _bytes_of(file: str) -> bytes:
    try:
        with place_of(file).open("rb") as stream:
            body = stream.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise PolicyError(Problem(file, "no such file")) from None
    except IsADirectoryError:
        raise PolicyError(Problem(file, "is a folder, expected a YAML file")) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PolicyError(Problem(file, f"cannot be read: {reason}")) from None
    if len(body) > FILE_BYTES_MAX:
        raise PolicyError(Problem(file, f"is larger than {FILE_BYTES_MAX} bytes"))
    return body


def _text_of(file: str, body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
        raise PolicyError(Problem(file, message)) from None
