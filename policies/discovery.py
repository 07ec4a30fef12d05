"""What a policy file says of servers that run elsewhere: which, and how they are found."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from policies.fields import VARIABLE, PolicyModel, base_url
from policies.kv_following import FollowedEvents, HostsEvents

Kind = Literal["headgate", "vllm", "sglang", "openai"]

KIND = "What runs there: `headgate`, `vllm`, `sglang`, or any OpenAI-compatible server, `openai`."
WEIGHT = "Share of the traffic beside others of weight 1, as far as load alone decides."
TOKENIZER = (
    "Folder (relative to the policy file) with the tokenizer.json and the chat template of the "
    "model there, or its name on the hub where this machine has fetched it; for exact prompts in "
    "routing; default: by bytes."
)
KEY = "Environment variable that holds the key sent to this server."


class Upstream(PolicyModel):
    """An OpenAI-compatible server that runs elsewhere: vLLM, SGLang, another gateway."""

    url: Annotated[str, AfterValidator(base_url)] = Field(
        description="Base URL, with or without /v1."
    )
    api_key_env: str | None = Field(None, pattern=VARIABLE, description=KEY)
    kind: Kind = Field("openai", description=KIND)
    weight: float = Field(1.0, gt=0, le=1000, description=WEIGHT)
    drain: bool = Field(False, description="Takes nothing new; what runs there goes on.")
    kv_events: FollowedEvents | None = Field(
        None,
        description="Where the server tells what its KV cache holds; without, it is guessed. Needs "
        "`tokenizer`.",
    )
    tokenizer: str | None = Field(None, min_length=1, description=TOKENIZER)

    @model_validator(mode="after")
    def _events_mean_something(self) -> Upstream:
        if self.kv_events is not None and self.tokenizer is None:
            raise ValueError("`kv_events` tell of tokens: give `tokenizer`, too")
        return self


class Discovery(PolicyModel):
    """Replicas of one kind that come and go: listed in a file, or by a name in DNS."""

    file: str | None = Field(
        None,
        min_length=1,
        description="YAML file that lists them under `replicas`, each with `url`, `weight` and "
        "`drain`; relative to the policy file. Read again when it changes.",
    )
    dns: str | None = Field(
        None,
        min_length=1,
        max_length=253,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="Name whose addresses are the replicas.",
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="Port of the replicas that `dns` finds."
    )
    every_s: float = Field(
        2.0, gt=0, le=3600, description="How often the file or the name is looked at."
    )
    api_key_env: str | None = Field(
        None, pattern=VARIABLE, description="Environment variable that holds the key sent to them."
    )
    kind: Kind = Field("openai", description=KIND)
    weight: float = Field(1.0, gt=0, le=1000, description=WEIGHT)
    kv_events: HostsEvents | None = Field(
        None,
        description="Where each of them tells what its KV cache holds; without, it is guessed. "
        "Needs `tokenizer`.",
    )
    tokenizer: str | None = Field(None, min_length=1, description=TOKENIZER)

    @model_validator(mode="after")
    def _events_mean_something(self) -> Discovery:
        if self.kv_events is not None and self.tokenizer is None:
            raise ValueError("`kv_events` tell of tokens: give `tokenizer`, too")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Discovery:
        if (self.file is None) == (self.dns is None):
            raise ValueError("give either `file` or `dns`")
        if (self.dns is None) != (self.port is None):
            raise ValueError("`dns` and `port` go together")
        return self


class Member(PolicyModel):
    """One replica of a discovery file."""

    url: Annotated[str, AfterValidator(base_url)] = Field(
        description="Base URL, with or without /v1."
    )
    weight: float | None = Field(
        None, gt=0, le=1000, description="Instead of the weight in the policy."
    )
    drain: bool = Field(False, description="Takes nothing new; what runs there goes on.")


class Members(PolicyModel):
    """A discovery file, whole."""

    replicas: tuple[Member, ...] = Field(
        max_length=1024, strict=False, description="The replicas there are now."
    )
