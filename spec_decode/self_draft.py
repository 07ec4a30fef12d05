"""The target's own weights in a cheaper form as its draft: in eight bits, or with layers left out.

Knows which layers to leave out; knows no tensors. Such a draft needs no keys and values of its own:
it continues the target's, and verification overwrites what it has written (Zhang et al. 2024,
"Draft & Verify").
"""

from __future__ import annotations


def kept_layers(count: int, share: float) -> list[int]:
    """Numbers of about `share` of `count` layers: the first, the last, and evenly between them.

    The ends are kept because they translate between words and the middle's language.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the layers lies above 0 and at most at 1, got {share}")
    kept = min(count, max(1, round(count * share)))
    if kept == 1:
        return [0]
    return [round(at * (count - 1) / (kept - 1)) for at in range(kept)]
