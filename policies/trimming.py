"""What a policy leaves out of prompts, and which whole answers it gives again."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from policies.fields import PolicyModel, Size


class Passages(PolicyModel):
    """Retrieved passages: those in `documents`, and those in a user's message that begin at the
    start of a line with `[1]`, `Passage 1:`, `Document 1:` or `Source 1:`."""

    keep: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Most passages of a message: the best by BM25 for the rest of its text stay, "
        "in their order. null: all.",
    )
    near_duplicates: float | None = Field(
        None,
        gt=0,
        le=1,
        description="A passage goes when it shares this much of its three-word shingles (Jaccard) "
        "with one before it; 0.8 is a good beginning. null: none goes.",
    )

    @model_validator(mode="after")
    def _does_something(self) -> Passages:
        if self.keep is None and self.near_duplicates is None:
            raise ValueError("nothing to do: give `keep`, `near_duplicates`, or both")
        return self


class Cutting(PolicyModel):
    """When a conversation is cut, and how far."""

    drop: Literal["off", "oldest", "middle"] = Field(
        "off",
        description="Which rounds go when a prompt is over its budget: the oldest, or those "
        "between the first ones and the last ones. Never the system prompt, never half a "
        "tool call.",
    )
    budget_tokens: int = Field(
        8192, ge=64, le=2**24, description="A prompt with more tokens, tools included, is cut."
    )
    keep_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="A cut goes down to this share of the budget, so that the next one is far off "
        "and the cache stays warm. 1: just below the budget, which moves the cut in every turn.",
    )
    head_share: float = Field(
        0.7,
        ge=0,
        lt=1,
        description="`middle`: this much of what is kept are the conversation's first rounds.",
    )


class Trim(Cutting):
    """What is left out of prompts before they are sent. Off by default: measure it first."""

    tool_output_chars: int | None = Field(
        None,
        ge=64,
        le=2**24,
        description="Longer outputs of tools keep their beginning and end, from the first time "
        "that they are sent. null: whole.",
    )
    passages: Passages | None = Field(None, description="Which retrieved passages stay.")
    tiers: dict[str, Cutting] = Field({}, description="Other cuts for the tiers of requests.")
    models: dict[str, Cutting] = Field({}, description="Other cuts for models, before the tiers'.")

    def cutting(self, model: str, tier: str) -> Cutting:
        """The cut for one request: its model's, its tier's, or the common one."""
        return self.models.get(model) or self.tiers.get(tier) or self

    @property
    def off(self) -> bool:
        cuts = (self, *self.tiers.values(), *self.models.values())
        idle = self.tool_output_chars is None and self.passages is None
        return idle and all(cut.drop == "off" for cut in cuts)


class ResponseCache(PolicyModel):
    """Whole answers that are given again to the same request. Off until tiers are named."""

    tiers: tuple[str, ...] = Field(
        strict=False,
        min_length=1,
        max_length=64,
        description="Tiers whose requests may get an answer that was given before.",
    )
    ttl_s: float = Field(
        3600.0, gt=0, le=30 * 86400, description="Answers are forgotten after this long."
    )
    max_bytes: Size = Field(
        64 * 2**20,
        ge=2**16,
        le=2**40,
        description="Most that one gateway process keeps; a size such as `64 MiB`.",
    )
