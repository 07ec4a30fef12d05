"""What a gate compares, and what its verdict is bound to: two configurations and what is asked.

The policy that a hypothesis names may have optimizations of its own; it is judged on top of those
that stand before it and are served. docs/binding.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from policies.chain import Chain, hypotheses, ledger_for
from policies.devices import Devices, devices
from policies.gating import Gate
from policies.hypothesis import Hypothesis, Variant
from policies.leaves import Binder, Unknown, spec_side
from policies.ledger import Ledger, LedgerError, Reading
from policies.load import load, read_yaml
from policies.patching import Configured, configured, variants
from policies.side import Side
from policies.standing import Question, Standing, judged

__all__ = ["Unknown", "ledger_of", "pair", "sides", "standing_of"]

_GATED = ("optimizations", "gate")  # of a policy; in a pair what they said is done already


def pair(
    file: str | Path,
    hypothesis: Hypothesis,
    now: float | None = None,
    told: Callable[[], Devices] = devices,
) -> tuple[Configured | None, ...]:
    """Baseline and candidate as policies without optimizations: with the patches of those that
    stand before this one in the policy, as far as they are served. None for a variant at a URL.

    Raises PolicyError.
    """
    moment = time.time() if now is None else now
    named = (("baseline", hypothesis.baseline), ("candidate", hypothesis.candidate))
    return tuple(
        one and _bare(one, file, hypothesis, name, variant, moment, told)
        for (name, variant), one in zip(named, variants(file, hypothesis), strict=True)
    )


def _bare(
    one: Configured,
    file: str | Path,
    hypothesis: Hypothesis,
    name: str,
    variant: Variant,
    now: float,
    told: Callable[[], Devices],
) -> Configured:
    data, _, _ = read_yaml(str(one.file))
    if not any(part in data for part in _GATED):
        return one
    policy = Configured(one.file, data, load(one.file))
    chain = Chain(policy, now, told)
    for path, before in hypotheses(one.file, policy.deployment):
        if before.name == hypothesis.name:
            break
        chain.add(path, before)
    bare = {part: said for part, said in chain.so_far.data.items() if part not in _GATED}
    return configured(one.file, bare, file, name, variant)


def ledger_of(file: str | Path, hypothesis: Hypothesis) -> Ledger:
    """Where its verdicts belong: the ledger that its baseline's policy names, else beside it."""
    baseline, _ = variants(file, hypothesis)
    return ledger_for(Path(file), baseline)


def sides(
    file: str | Path, hypothesis: Hypothesis, told: Callable[[], Devices] = devices
) -> tuple[Side, Side, Side]:
    """Baseline, candidate, and what is asked of them, of a hypothesis in `file`.

    A variant that runs at a URL is known by that alone. Raises PolicyError or Unknown.
    """
    named = (hypothesis.baseline, hypothesis.candidate)
    found = []
    for variant, one in zip(named, pair(file, hypothesis, told=told), strict=True):
        if one is None:
            found.append(Side.of({"url": variant.url}))
        else:
            found.append(Binder(one.file, told).side(one.deployment))
    baseline, candidate = found
    return baseline, candidate, spec_side(file, hypothesis)


def standing_of(
    file: str | Path, hypothesis: Hypothesis, now: float, told: Callable[[], Devices] = devices
) -> Standing:
    """How a hypothesis stands that no policy names: by its own baseline, and strictly. Raises
    PolicyError."""
    path = Path(file).absolute()
    baseline, _ = variants(path, hypothesis)
    ledger = ledger_for(path, baseline)
    gate = baseline.deployment.gate if baseline is not None else Gate()
    strict = gate.model_copy(update={"enforce": "strict"})
    try:
        reading, unreadable = ledger.read(), ""
    except LedgerError as error:
        reading, unreadable = Reading(), str(error)

    def both() -> tuple[Side, Side, Side]:
        return sides(path, hypothesis, told)

    one = judged(Question(path, hypothesis, both, strict, ledger, reading, now))
    return replace(one, enabled=False, why=unreadable or one.why)
