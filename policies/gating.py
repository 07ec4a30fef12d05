"""What a policy file says of optimizations: which, and what lets them go live."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from policies.fields import PolicyModel
from policies.quantities import Duration


class Optimization(PolicyModel):
    """A change to this policy that goes live by its verdict."""

    hypothesis: str = Field(
        min_length=1,
        description="Hypothesis file, relative to the policy file; its candidate's patch is what "
        "is enabled.",
    )


class Gate(PolicyModel):
    """What lets an optimization go live: a pass in the ledger for exactly what would be served."""

    ledger: str | None = Field(
        None,
        min_length=1,
        description="Folder of the ledger, relative to the policy file. null: `.headgate/ledger` "
        "beside each hypothesis.",
    )
    enforce: Literal["strict", "warn", "off"] = Field(
        "strict",
        description="`strict`: only a live pass enables. `warn`: without one it is enabled and "
        "told, unless it failed or is quarantined. `off`: all are enabled, no verdict is asked "
        "for.",
    )
    max_age: Duration | None = Field(
        None,
        gt=0,
        le=3650 * 86400,
        description="Age from which on a pass is stale, such as `30d`, where that is sooner than "
        "the hypothesis says. null: as it says.",
    )
