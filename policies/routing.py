"""What a policy file says of routing: how a replica is chosen for a request."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from policies.fields import PolicyModel

Way = Literal["auto", "cost", "p2c", "round_robin", "least_loaded"]
ALPHA = {"interactive": 0.1, "standard": 0.2, "relaxed": 0.4, "batch": 1.0}
OTHER_ALPHA = 0.2


class Routing(PolicyModel):
    """The defaults need no tuning: rates are learned from what replicas do."""

    policy: Way = Field(
        "auto",
        description="`cost`: where the first token is due first, by what is cached and what waits; "
        "`auto`: the same while its predictions hold, else the less loaded of two at random "
        "(`p2c`); `round_robin`; `least_loaded`.",
    )
    alpha: dict[str, float] = Field(
        ALPHA,
        description="By tier, how much more than its own wait the work counts that a request makes "
        "for others: 0 is selfish, higher ones keep to where prompts are cached.",
    )
    receipts: int = Field(
        2048, ge=0, le=10**6, description="Decisions that are kept for `headgate explain`."
    )

    def alpha_of(self, tier: str) -> float:
        """For a tier that nobody names, the one in the middle."""
        return self.alpha.get(tier, ALPHA.get(tier, OTHER_ALPHA))
