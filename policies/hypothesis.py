"""A hypothesis: what changes, what it must gain, what it must not lose, and on which evidence.

The shape of the file only: `load.py` reads it, `patching.py` makes the two configurations of it,
`evidence.py` finds its suites and replays. docs/hypothesis.md describes every field.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from policies.fields import VARIABLE, PolicyModel, refuse
from policies.knobs import KNOBS, Kind, allowed, kinds_for, knob_of
from policies.problems import closest
from policies.quantities import Blocks, Duration, Pairs, Share

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
METRIC = r"^[a-z][a-z0-9_]*(\.(p[0-9]{1,2}|mean))?$"
# What each test is bounded by, if not by a margin.
_BOUNDS = {"rate_max": "max", "mean_max": "max", "law_max": "max", "percentile_max": "within"}
_Misfit = tuple[tuple[str | int, ...], str, object]


class Metadata(PolicyModel):
    """What people call it."""

    name: str = Field(pattern=NAME, description="Name of the hypothesis: lower case, digits, `-`.")
    owner: str = Field("", max_length=128, description="Who answers for it.")
    ticket: str = Field("", max_length=128, description="Where it was asked for.")
    note: str = Field("", max_length=4096, description="Why it should hold.")


class Variant(PolicyModel):
    """One of the two configurations: a policy file, changed or not, or a server that runs."""

    config: str | None = Field(
        None,
        min_length=1,
        description="Policy file, relative to the hypothesis. Default of a candidate that patches: "
        "the baseline's.",
    )
    patch: dict[str, Any] = Field(
        {}, description="Knobs by their path, such as `runtime.kv: int8`; a value replaces whole."
    )
    url: str | None = Field(
        None,
        pattern=r"^https?://[!-~]+$",
        description="A server that runs already, in place of a policy file.",
    )
    api_key_env: str | None = Field(
        None,
        pattern=VARIABLE,
        description="Environment variable with the key to send. Default: that of a served policy's "
        "only tenant; of a candidate that patches the baseline's policy, the baseline's.",
    )
    metrics_key_env: str | None = Field(
        None,
        pattern=VARIABLE,
        description="Of a `url`: environment variable with the key that its /metrics asks for, "
        "where that is another, as a gateway's operator has (`gateway.admin.key_env`).",
    )
    model: str | None = Field(
        None, min_length=1, description="Name of the model to ask. Default: the first it offers."
    )


class Evidence(PolicyModel):
    """Where a metric is taken from."""

    suite: str | None = Field(
        None,
        min_length=1,
        description="Suite, by its file or its name: beside the hypothesis, else one that ships.",
    )
    replay: str | None = Field(
        None, min_length=1, description="Recorded traffic, by its file or folder or by its name."
    )
    metric: str = Field(
        pattern=METRIC,
        description="A scorer of the suite, or `ttft.p95`, `tpot.p50`, `output_tokens`, `lost`...",
    )

    @property
    def source(self) -> str | None:
        """`suite:NAME` or `replay:NAME`, None where it is left to the hypothesis."""
        if self.suite is not None:
            return f"suite:{self.suite}"
        return f"replay:{self.replay}" if self.replay is not None else None


class Claim(Evidence):
    """What the candidate must gain; one that is shown is enough."""

    direction: Literal["lower", "higher"] = Field(description="Which way is better.")
    min_effect: Share = Field(
        0.0,
        ge=0,
        lt=1,
        description="Smallest gain that counts, as a share of the baseline: `8%`.",
    )


class Guardrail(Evidence):
    """What the candidate must not lose. All of them must be shown."""

    test: Literal[
        "paired_ni",
        "rate_max",
        "mean_max",
        "percentile_max",
        "ratio_ni",
        "tost",
        "identical",
        "law_max",
    ] = Field(description="How it is shown: docs/statistics.md.")
    margin: Share | None = Field(
        None,
        gt=0,
        lt=1,
        description="Largest acceptable loss: a difference for `paired_ni` and `identical`, a "
        "share of the baseline for `ratio_ni` and `tost`.",
    )
    max: Share | None = Field(
        None,
        gt=0,
        description="Largest rate, mean or distance that is acceptable: `rate_max`, `mean_max`, "
        "`law_max`.",
    )
    within: Duration | None = Field(
        None,
        gt=0,
        le=86400,
        description="Time that a percentile must keep, proven as a rate of late requests: "
        "`percentile_max`.",
    )
    cluster: str | None = Field(
        None,
        min_length=1,
        description="What answers depend on together: `conversation`, `document`, or a field of "
        "the rows. Default: the suite's.",
    )
    strata: tuple[Literal["tier", "tenant", "turn", "prompt_bucket"], ...] = Field(
        (), strict=False, max_length=4, description="Also shown for each part of the traffic by."
    )

    @model_validator(mode="after")
    def _has_its_bound(self) -> Guardrail:
        wanted = _BOUNDS.get(self.test, "margin")
        misfits: list[_Misfit] = []
        if getattr(self, wanted) is None:
            misfits.append((("test",), f"{self.test} needs `{wanted}`", self.test))
        misfits += [
            ((other,), f"{self.test} takes `{wanted}`, not `{other}`", None)
            for other in ("margin", "max", "within")
            if other != wanted and getattr(self, other) is not None
        ]
        refuse(misfits)
        return self


class Design(PolicyModel):
    """How the two are compared."""

    order: Literal["abba"] = Field(
        "abba", description="Order of the arms in a pair of blocks; its mirror by the seed."
    )
    block: Duration = Field(
        60.0, gt=0, le=3600, description="Length of a block of recorded traffic: `60s`."
    )
    block_items: int = Field(
        20, ge=1, le=10_000, description="Rows of a suite in a block, conversations kept whole."
    )
    warmup: Blocks = Field(
        1, ge=0, le=100, description="Blocks that are run first in each arm and not counted."
    )
    repeats: int = Field(1, ge=1, le=100, description="How often each row is asked.")
    concurrency: int = Field(
        4, ge=1, le=1024, description="Requests of a suite under way at once, in the arm that runs."
    )
    speed: float | None = Field(
        1.0,
        gt=0,
        le=1000,
        description="Recorded traffic is played this much faster. null: as fast as possible.",
    )
    timeout: Duration = Field(
        120.0, gt=0, le=86400, description="Longest time of a request; a longer one is lost."
    )
    temperature: Literal["as_recorded"] | float = Field(
        "as_recorded", description="Temperature of every request, or what the row says."
    )
    sessions: bool = Field(
        True, description="Turns of a conversation are asked in their order, one after another."
    )
    cold_blocks: bool = Field(
        True,
        description="Nothing is cached at the begin of a block: its requests have a `cache_salt` "
        "of their own. A server that refuses unknown fields needs `false`. With `false` caches "
        "live on, and controls run in all blocks, on servers of their own.",
    )
    servers: Literal["together", "in_turn"] = Field(
        "together",
        description="`together`: all arms stay in memory, side by side. `in_turn`: one at a time, "
        "started anew where the order changes arms; with blocks that are worth a start.",
    )
    aa_control: bool = Field(
        True, description="A second baseline, which shows what chance alone does."
    )
    sabotage_control: bool = Field(
        True, description="A spoiled baseline, which the gate has to find out."
    )
    sabotage_wrong: Share = Field(
        0.1, ge=0, le=1, description="Share of answers that the spoiled baseline gets wrong."
    )
    sabotage_slow: Share = Field(
        0.3, ge=0, le=10, description="How much longer its answers take, as a share."
    )
    control_share: Share = Field(
        0.25,
        gt=0,
        le=1,
        description="Share of the blocks that the two control arms run in; 12 blocks at least, "
        "where there are as many.",
    )


class Stats(PolicyModel):
    """How sure is sure enough."""

    alpha: float = Field(
        0.05, gt=0, le=0.2, description="Chance of a pass where the loss is exactly the margin."
    )
    power: float = Field(
        0.8, ge=0.5, lt=1, description="Chance of a pass that is planned for where nothing is lost."
    )
    flips: Share = Field(
        0.06,
        ge=0,
        le=1,
        description="Share of answers that are expected to change between right and wrong: what is "
        "planned by before a run has measured it.",
    )
    mode: Literal["fixed", "sequential"] = Field(
        "fixed",
        description="`fixed`: one look at the end. `sequential`: stops as soon as it is sure.",
    )
    max_pairs: Pairs = Field(
        3000, ge=10, le=10**7, description="Most pairs of a suite or replay, repeats included."
    )
    seed: int = Field(7, ge=0, le=2**31 - 1, description="Makes order and samples repeatable.")


class Activation(PolicyModel):
    """Proof that what changed did run: a counter of the candidate that has to rise."""

    metric: str = Field(
        pattern=r"^[a-z][a-z0-9_:]*$",
        description="A counter at /metrics, with or without `headgate_` and `_total`, or a field "
        "of observations: `accepted_tokens`, `cached_tokens`, `trimmed_tokens`, `cached_answers`.",
    )
    min: float = Field(1.0, gt=0, description="By how much, over the whole run.")


class Validity(PolicyModel):
    """How long a verdict holds."""

    max_age: Duration = Field(
        30 * 86400.0, gt=0, le=3650 * 86400, description="Age from which on a verdict is stale."
    )
    on_traffic_drift: Literal["stale", "warn"] = Field(
        "stale", description="What it is when live traffic no longer looks like the replay."
    )
    min_affected_pairs: Pairs = Field(
        149,  # the fewest that can pass two points, without a flip: docs/statistics.md
        ge=1,
        le=10**6,
        description="Pairs that the change must have touched, with fewer it is inconclusive.",
    )


class Rollout(PolicyModel):
    """How it goes live after a pass."""

    shadow: Pairs = Field(500, ge=0, le=10**7, description="Live pairs before users see it.")
    steps: tuple[Share, ...] = Field(
        (0.01, 0.05, 0.25, 1.0),
        strict=False,
        min_length=1,
        max_length=32,
        description="Shares of sessions, one after the other.",
    )
    min_step: Duration = Field(
        600.0, gt=0, le=30 * 86400, description="Shortest time at one share."
    )
    monitor: Literal["same guardrails"] = Field(
        "same guardrails", description="What is watched on live traffic."
    )

    @model_validator(mode="after")
    def _rises(self) -> Rollout:
        steps = self.steps
        if any(not 0 < one <= 1 for one in steps) or list(steps) != sorted(set(steps)):
            refuse([(("steps",), "expected shares above 0 that rise to 100% at most", steps)])
        return self


class Hypothesis(PolicyModel):
    """A hypothesis file, whole."""

    apiVersion: Literal["headgate/v1"] = Field(  # noqa: N815  # as such files are headed
        description="`headgate/v1`."
    )
    kind: Literal["Hypothesis"] = Field(description="`Hypothesis`.")
    metadata: Metadata = Field(description="What people call it.")
    baseline: Variant = Field(description="What serves now.")
    candidate: Variant = Field(description="What could serve instead.")
    kind_of_change: Kind = Field(
        description="What the change can do to answers; says which knobs it may touch."
    )
    claims: tuple[Claim, ...] = Field(
        (),
        strict=False,
        max_length=32,
        description="What must be gained; without one shown the verdict is `no_benefit`.",
    )
    guardrails: tuple[Guardrail, ...] = Field(
        strict=False, min_length=1, max_length=64, description="What must not be lost."
    )
    design: Design = Field(Design(), description="How the two are compared.")
    stats: Stats = Field(Stats(), description="How sure is sure enough.")
    activation: tuple[Activation, ...] = Field(
        (), strict=False, max_length=16, description="Proof that what changed did run."
    )
    validity: Validity = Field(Validity(), description="How long a verdict holds.")
    rollout: Rollout = Field(Rollout(), description="How it goes live after a pass.")

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def sources(self) -> tuple[str, ...]:
        """`suite:NAME` and `replay:NAME` of all that is asked, each once, in the file's order."""
        named = [one.source for one in (*self.guardrails, *self.claims)]
        return tuple(dict.fromkeys(one for one in named if one is not None))

    def source_of(self, claim: Claim) -> str:
        """Where a claim is taken from: what it names, else the first replay, else the first."""
        if claim.source is not None:
            return claim.source
        replays = (one for one in self.sources if one.startswith("replay:"))
        return next(replays, self.sources[0])

    @model_validator(mode="after")
    def _fits_together(self) -> Hypothesis:
        refuse([*self._variants(), *self._patched(), *self._evidence()])
        return self

    def _variants(self) -> Iterator[_Misfit]:
        base, other = self.baseline, self.candidate
        for name, one in (("baseline", base), ("candidate", other)):
            if one.config is not None and one.url is not None:
                yield (name, "url"), "give `config` or `url`, not both", one.url
            if one.metrics_key_env is not None and one.url is None:
                why = "is for a `url`: of a policy that is served here, its own admin key is sent"
                yield (name, "metrics_key_env"), why, one.metrics_key_env
            if one.url is not None and one.patch:
                yield (name, "patch"), "a server that runs cannot be patched", one.patch
        if base.config is None and base.url is None:
            yield ("baseline",), "give `config`, a policy file, or `url`", None
        if other == base:
            yield ("candidate",), "changes nothing: give `patch`, another `config`, or `url`", None
        if other.url is None and other.config is None and base.config is None:
            yield ("candidate",), "give `config`: the baseline has no policy file", None

    def _patched(self) -> Iterator[_Misfit]:
        for name in ("baseline", "candidate"):
            for path, value in getattr(self, name).patch.items():
                if (why := misfit(self.kind_of_change, path)) is not None:
                    yield (name, "patch", path), why, value

    def _evidence(self) -> Iterator[_Misfit]:
        for part in ("claims", "guardrails"):
            for index, one in enumerate(getattr(self, part)):
                if one.suite is not None and one.replay is not None:
                    yield (part, index, "replay"), "give `suite` or `replay`, not both", None
                if part == "guardrails" and one.source is None:
                    yield (part, index), "give `suite` or `replay`: what it is taken from", None


def misfit(kind: Kind, path: str) -> str | None:
    """Why a change of this kind may not touch a field, or None."""
    knob = knob_of(path)
    if knob is None:
        near = closest(path, list(KNOBS))
        hint = f"; did you mean {near!r}?" if near else f"; there are {', '.join(KNOBS)}"
        return "is no knob that a hypothesis may change" + hint
    if not allowed(kind, knob):
        may = " or ".join(kinds_for(knob))
        return f"a {kind} change may not touch {knob}: say `kind_of_change: {may}`"
    return None
