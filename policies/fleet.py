"""`fleet`: how many replicas `headgate serve --on ray` keeps on a Ray cluster, and where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from policies.fields import PolicyModel

NODE_LABEL = "ray.io/node-id"  # which Ray itself puts on every node


class Fleet(PolicyModel):
    """Replicas of the runtime on a Ray cluster."""

    replicas_min: int = Field(
        1, ge=1, le=1024, description="Never fewer, as long as there is room."
    )
    replicas_max: int = Field(4, ge=1, le=1024, description="Never more.")
    spread: Literal["prefer", "strict"] = Field(
        "prefer",
        description="`strict` never puts two replicas into one failure domain and waits for "
        "another instead; `prefer` does where no other has room.",
    )
    domain: str = Field(
        NODE_LABEL,
        min_length=1,
        max_length=128,
        description="Label of Ray's nodes that names their failure domain: `ray.io/node-id`, each "
        "node one, or such as `ray.io/availability-zone`.",
    )
    cpus: float | None = Field(
        None,
        gt=0,
        le=4096,
        description="CPUs of Ray that a replica takes; default: `runtime.threads`, else 1.",
    )
    gpus: float | None = Field(
        None,
        ge=0,
        le=64,
        description="GPUs of Ray that a replica takes, and sees; default: 1 where `runtime.device` "
        "is `cuda`, else 0.",
    )
    resources: dict[str, float] = Field(
        {}, max_length=16, description="Further resources of Ray that a replica takes, by name."
    )
    queued_tokens: int = Field(
        8192,
        ge=1,
        le=2**30,
        description="Prompt tokens still to be computed that one replica is wanted for.",
    )
    running: int = Field(
        16, ge=1, le=10**6, description="Answers under way that one replica is wanted for."
    )
    up_after_s: float = Field(
        5.0,
        ge=0,
        le=3600,
        description="More replicas are started when they were wanted for so long.",
    )
    down_after_s: float = Field(
        300.0,
        ge=0,
        le=86400,
        description="Replicas are taken away, drained, when they were not wanted for so long.",
    )
    start_timeout_s: float = Field(
        900.0,
        gt=0,
        le=86400,
        description="A replica that has a place and is not ready after so long is given up.",
    )

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Fleet:
        if self.replicas_max < self.replicas_min:
            raise ValueError(
                f"replicas_max is {self.replicas_max}, less than replicas_min, {self.replicas_min}"
            )
        return self
