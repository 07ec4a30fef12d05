"""With whose key each of two configurations is asked. Knows names of variables, never a key."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from policies.hypothesis import Hypothesis, Variant
from policies.load import read_yaml
from policies.patching import Configured
from policies.problems import PolicyError, Problem, dotted


def keyed(hypothesis: Hypothesis, configured: Sequence[Configured | None]) -> Iterator[Variant]:
    """Baseline and candidate with the variable of the key that each is asked with: its own; the
    baseline's, where its policy is patched; that of a served policy's only tenant."""
    base, other = hypothesis.baseline, hypothesis.candidate
    if other.api_key_env is None and other.url is None and other.config in (None, base.config):
        other = other.model_copy(update={"api_key_env": base.api_key_env})
    for one, served in zip((base, other), configured, strict=True):
        tenants = [] if served is None else list(served.deployment.gateway.tenants.values())
        if one.api_key_env is None and len(tenants) == 1:
            yield one.model_copy(update={"api_key_env": tenants[0].key_env})
        else:
            yield one


def refuse_keyless(
    file: Path, hypothesis: Hypothesis, configured: Sequence[Configured | None]
) -> None:
    """A server that asks for a key would refuse every request of a run. Raises PolicyError."""
    _, places, _ = read_yaml(str(file))

    def refuse(why: str, *path: str) -> NoReturn:
        raise PolicyError(Problem(str(file), why, places.of(path), dotted(path)))

    asked = zip(("baseline", "candidate"), keyed(hypothesis, configured), configured, strict=True)
    for name, one, served in asked:
        what = one.url if served is None else served.file
        for field, place in (("api_key_env", what), ("metrics_key_env", f"{what}'s /metrics")):
            variable = getattr(one, field)
            if variable is not None and not os.environ.get(variable):
                why = f"the environment has no {variable}: export the key that {place} asks for"
                refuse(why, name, field)
        if served is not None and served.deployment.gateway.tenants and one.api_key_env is None:
            refuse(f"{what} has tenants: name the variable with one's key by api_key_env", name)
