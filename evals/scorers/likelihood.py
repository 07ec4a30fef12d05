"""What the model thinks of a text: perplexity, and how far two arms are apart (KL).

Rows are text completions with `echo: true`, `logprobs: 1` and `max_tokens: 0`: nothing is
generated, and the log-probabilities in the answer are those of the prompt's own tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from telemetry import Observation


def perplexity(seen: Observation) -> float | None:
    """exp of the mean negative log-likelihood; None where nobody told any."""
    if not seen.ok or not seen.logprobs:
        return None
    return math.exp(-math.fsum(seen.logprobs) / len(seen.logprobs))


def divergence(baseline: Sequence[float], candidate: Sequence[float]) -> float | None:
    """Mean over tokens of r - 1 - ln r with r = p_candidate / p_baseline, in nats.

    Never negative, 0 only where both agree. Over tokens that the baseline drew it is an unbiased
    estimate of KL(baseline || candidate) (Schulman 2020, "Approximating KL divergence", k3); over
    a given text it is a distance at that text. None where the tokens are not the same ones.
    """
    if not baseline or len(baseline) != len(candidate):
        return None
    logs = [min(c - b, _LOG_RATIO_MAX) for b, c in zip(baseline, candidate, strict=True)]
    return math.fsum(math.expm1(one) - one for one in logs) / len(logs)


_LOG_RATIO_MAX = 50.0  # e^50 is as bad as it gets, and no overflow
