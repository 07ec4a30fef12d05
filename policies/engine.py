"""The runtime's part of a policy file: the model, its formats, its memory, its guesses."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from policies.fields import LAST_PORT, VARIABLE, PolicyModel, Size, event_endpoint, tcp_ports


class KvEvents(PolicyModel):
    """Which blocks the KV pool can find, told over ZMQ in vLLM's format: see docs/events.md."""

    endpoint: Annotated[str, AfterValidator(event_endpoint)] = Field(
        "tcp://127.0.0.1:5557",
        description="Where events are published: `tcp://` on loopback or `ipc://`. Worker n takes "
        "the port n above; 0 takes a free one, which /health tells.",
    )
    replay_endpoint: Annotated[str, AfterValidator(event_endpoint)] | None = Field(
        "tcp://127.0.0.1:5657",
        description="Where missed events are asked for, by the same rules; null: no replay.",
    )
    topic: str = Field("", max_length=256, description="First frame of each event; any text.")
    buffer_steps: int = Field(
        10_000,
        ge=1,
        le=10**6,
        description="Batches kept for replay; older ones are folded into a snapshot.",
    )
    hwm: int = Field(
        10_000,
        ge=1,
        le=10**6,
        description="Batches queued for one subscriber; a slower one misses what comes, and sees "
        "a gap.",
    )

    def port_clash(self, workers: int) -> str | None:
        """Why the ports of several workers would meet, or None."""
        ports = tcp_ports(self.endpoint, self.replay_endpoint)
        if any(port and port + workers - 1 > LAST_PORT for port in ports):
            return f"the ports of {workers} workers end beyond {LAST_PORT}"
        if len(ports) == 2 and all(ports) and abs(ports[0] - ports[1]) < workers:
            return f"{workers} workers need ports of kv_events that are {workers} apart or more"
        if self.endpoint == self.replay_endpoint and not (ports and not ports[0]):
            return "kv_events.endpoint and kv_events.replay_endpoint are the same"
        return None


class DiskTier(PolicyModel):
    """A folder that evicted KV blocks are kept in, and found in again after a restart."""

    path: str = Field(
        min_length=1,
        description="Folder, relative to the policy file; made when missing, readable by its owner "
        "only.",
    )
    max_bytes: Size = Field(
        ge=2**24,
        le=2**50,
        description="Most that one worker keeps there; a size such as `20 GiB`.",
    )


class Tiers(PolicyModel):
    """Where KV blocks go that the pool has no room for. They come back when that is faster than
    computing them again."""

    host_bytes: Size = Field(
        0,
        ge=0,
        le=2**50,
        description="Host memory for them in one worker; a size such as `2 GiB`. 0: none.",
    )
    disk: DiskTier | None = Field(None, description="A folder for them, below host memory.")

    @model_validator(mode="after")
    def _keeps_something(self) -> Tiers:
        if not self.host_bytes and self.disk is None:
            raise ValueError("nowhere to keep blocks: give `host_bytes`, `disk`, or both")
        return self


WeightFormat = Literal["auto", "fp32", "bf16", "w8a8", "w8", "int4", "fp8"]
_WEIGHT_FORMATS: tuple[str, ...] = get_args(WeightFormat)


class Weights(PolicyModel):
    """Number format of the linear layers' weights, for each part of a model."""

    attention: WeightFormat = Field(
        "auto", description="Layers inside attention: queries, keys, values, output."
    )
    mlp: WeightFormat = Field(
        "auto", description="The other linear layers, except routers, which stay as they are."
    )
    head: WeightFormat = Field("auto", description="The output layer over the vocabulary.")


def _each_part(value: object) -> object:
    """One format alone is that of all parts."""
    if not isinstance(value, str):
        return value
    if value not in _WEIGHT_FORMATS:
        return {"attention": value}  # told once, with the formats that there are
    return dict.fromkeys(Weights.model_fields, value)


def _proposer(value: object) -> object:
    if value == "synthetic":
        raise ValueError(
            "synthetic acceptance makes answers up: it is for benchmarks, which build their engine "
            "themselves"
        )
    return value


class Guesses(PolicyModel):
    """Who guesses tokens ahead, and how many."""

    proposer: Annotated[
        Literal["off", "auto", "ngram", "tree", "prediction", "draft", "self"],
        BeforeValidator(_proposer),
    ] = Field(
        "auto",
        description="`auto` guesses where it makes answers faster, with whatever there is; a name "
        "always guesses with that one; `off` never guesses.",
    )
    max_tokens: int = Field(
        7,
        ge=1,
        le=15,
        description="Most tokens guessed for an answer in one step; by name, exactly so many.",
    )


def _guesses(value: object) -> object:
    """`off` and `auto` alone are proposers."""
    return {"proposer": value} if isinstance(value, str) else value


SomeGuesses = Annotated[Guesses, BeforeValidator(_guesses)]


class Speculation(Guesses):
    """Speculative decoding: tokens are guessed cheaply and verified together, and answers stay what
    they would have been."""

    draft: str | None = Field(
        None,
        min_length=1,
        description="Model that guesses: `pocket` (its own draft), a folder (relative to the "
        "policy file), or a hub name. Smaller than `model`, with about the same tokens.",
    )
    self_draft: Literal["w8a8", "layers"] | None = Field(
        None,
        description="The model guesses for itself: with its weights in 8 bits, or with "
        "`self_layers` of its layers.",
    )
    self_layers: float = Field(
        0.5, gt=0, lt=1, description="Share of the layers that `self_draft: layers` runs."
    )
    recent_tokens: int = Field(
        65536,
        ge=0,
        le=2**24,
        description="Tokens of recent answers in which `ngram` looks, too, for each tier; answers "
        "of different `cache_salt` or adapter never see each other. 0: none.",
    )
    tiers: dict[str, SomeGuesses] = Field(
        {}, description="Other guesses for the tiers that requests name (`x-headgate-tier`)."
    )
    models: dict[str, SomeGuesses] = Field(
        {}, description="Other guesses for models by the names that clients send: adapters, too."
    )

    @property
    def asked(self) -> set[str]:
        """All proposers that are asked for by name."""
        return {one.proposer for one in (self, *self.tiers.values(), *self.models.values())}

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Speculation:
        if "draft" in self.asked and self.draft is None:
            raise ValueError("proposer: draft needs `draft`, the model that guesses")
        if "self" in self.asked and self.self_draft is None:
            raise ValueError("proposer: self needs `self_draft`: w8a8 or layers")
        if self.draft is not None and self.self_draft is not None:
            raise ValueError("give `draft` or `self_draft`, not both")
        return self


class Runtime(PolicyModel):
    """Our own engine: one model, one or several worker processes."""

    model: str = Field(
        "pocket",
        min_length=1,
        description="`pocket`, a Hugging Face folder (relative to the policy file), or a hub name.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub name.")
    served_name: str | None = Field(
        None, min_length=1, description="Name that clients send; default: the last part of `model`."
    )
    workers: int = Field(1, ge=1, le=64, description="Worker processes, each with its own copy.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto` takes CUDA where there is one."
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Activations and KV cache; `auto`: bf16 on CUDA, fp32 on a CPU, but bf16 where "
        "`weights` ask for it and the CPU has arithmetic for it.",
    )
    weights: Annotated[Weights, BeforeValidator(_each_part)] = Field(
        Weights(),
        description="Format of the linear layers' weights: one for all parts, or one each. `auto`: "
        "the fastest that loses nothing against `dtype`.",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads a worker; default: cores divided by workers."
    )
    adapters: str | None = Field(
        None,
        min_length=1,
        description="Folder of LoRA adapters (relative to the policy file), each a PEFT folder "
        "that is served as a model of its own under the folder's name.",
    )
    kv: Literal["auto", "int8"] = Field(
        "auto",
        description="Format of cached keys and values: that of `dtype`, or 8 bits with scales.",
    )
    compile: Literal["off", "auto"] = Field(
        "off",
        description="`auto` compiles C++ for this CPU once, where a compiler is, and caches it.",
    )
    context_tokens: int | None = Field(
        None,
        ge=16,
        le=2**24,
        description="Longest prompt plus answer; default: what the model was trained for.",
    )
    kv_tokens: int = Field(
        32768, ge=64, le=2**28, description="Tokens that the paged KV pool holds, in blocks of 16."
    )
    tiers: Tiers | None = Field(
        None, description="Where KV blocks go that the pool has no room for."
    )
    step_tokens: int = Field(
        2048,
        ge=16,
        le=2**20,
        description="Most tokens of one step, decode and prefill chunks together; `tpot_ms` cuts "
        "it further while answers run.",
    )
    tpot_ms: float | None = Field(
        100.0,
        gt=0,
        le=3_600_000,
        description="Target for the time of one output token, where a request names none "
        "(`x-slo-tpot-ms`): prefill chunks are cut so that running answers keep it, and "
        "take up to twice as long where waiting prompts would be late. null: no target, chunks "
        "fill `step_tokens`.",
    )
    max_sequences: int = Field(
        64, ge=1, le=4096, description="Sequences in one batch; more wait in arrival order."
    )
    max_waiting: int = Field(
        1024,
        ge=1,
        le=10**6,
        description="Waiting requests; more are refused with 503 and Retry-After.",
    )
    speculation: Annotated[Speculation, BeforeValidator(_guesses)] = Field(
        Speculation(proposer="off"),
        description="Tokens guessed ahead: `off`, `auto`, or a mapping.",
    )
    kv_events: KvEvents | None = Field(
        None, description="Publishes which blocks are cached, for prefix-aware routing; off."
    )
    key_env: str | None = Field(
        None,
        pattern=VARIABLE,
        description="Environment variable with the key that workers ask for, needed where one "
        "listens beyond this machine (`--host`); they then take requests from anywhere.",
    )

    @model_validator(mode="after")
    def _event_ports_are_apart(self) -> Runtime:
        clash = self.kv_events.port_clash(self.workers) if self.kv_events else None
        if clash:
            raise ValueError(clash)
        return self
