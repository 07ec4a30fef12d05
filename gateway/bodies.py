"""What is sent to steer a rollout, or to drain a replica, as it has to be. What is done then, those
know who take it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from policies.discovery import Upstream
from policies.fields import PolicyModel, base_url

LEASE_MAX_S = 3600.0


class Lease(PolicyModel):
    """How much may go to the candidate, and for how long without another word."""

    id: str = Field(min_length=1, max_length=200)
    share: float = Field(0.0, ge=0, le=1, strict=False)
    shadow: float = Field(0.0, ge=0, le=1, strict=False)
    lease_s: float = Field(10.0, gt=0, le=LEASE_MAX_S, strict=False)


class Watched(PolicyModel):
    """One signal of a rollout: how far it is from proof, and from harm."""

    signal: str = Field(max_length=200)
    margin: float = Field(strict=False)
    pairs: int = Field(ge=0)
    difference: float = Field(strict=False)
    p_safe: float = Field(strict=False)
    p_harmful: float = Field(strict=False)
    passed: bool


class Stage(PolicyModel):
    """Where a rollout is, as its controller tells it for people who look."""

    at: int = Field(ge=0)  # 0: the shadow
    steps: tuple[float, ...] = Field(max_length=64, strict=False)
    began_at: float = Field(strict=False)
    min_step_s: float = Field(ge=0, strict=False)
    shadow_pairs: int = Field(ge=0)
    pairs: int = Field(ge=0)
    signals: tuple[Watched, ...] = Field((), max_length=64, strict=False)


class Renewed(Lease):
    """A lease, and where its rollout is."""

    stage: Stage | None = None


class Wanted(Lease):
    """A candidate, and the verdict that speaks for it."""

    name: str = Field(min_length=1, max_length=200)
    patch: dict[str, Any] = Field({}, max_length=64)
    replicas: tuple[Upstream, ...] = Field((), max_length=64, strict=False)
    fingerprints: tuple[str, ...] = Field((), max_length=64, strict=False)
    roots: dict[str, str] = Field({}, max_length=8)


class Pausing(PolicyModel):
    """Whether a rollout is to stay at its stage."""

    id: str = Field(min_length=1, max_length=200)
    why: str = Field("an operator paused it", min_length=1, max_length=2000)


class Ending(PolicyModel):
    """Why a rollout is to end."""

    id: str = Field(min_length=1, max_length=200)
    why: str = Field(min_length=1, max_length=2000)
    blamed: bool = True  # the candidate: it may not come back under this name either way


class Draining(PolicyModel):
    """A replica that is to take nothing new, or to take requests again."""

    url: Annotated[str, AfterValidator(base_url)] = Field(max_length=2000)
    why: str = Field("", max_length=2000)
