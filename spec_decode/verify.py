"""Rejection sampling: whatever was guessed, what is said follows the target's law exactly.

A guess d drawn from q is accepted with probability min(1, p(d) / q(d)), p being the target's law at
that place, filters, penalties, bias and masks included. At the first one that is not, a token is
drawn from (p - q)+, normalized; behind the last, one from p (Leviathan et al. 2023, Chen et al.
2023). Where a guess was certain, q is one at it, and the rule comes to this: draw from p; the guess
was right if it was drawn. That is what `agreed` counts, and it needs nothing of p: a request's
tokens are then the very tokens that it would get without any guesses.

Knows probabilities; knows no proposer and no request.

Legend: R rows, one for each guess and one more for each answer; V vocabulary; G guesses; A answers.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch


def agreed(guesses: Many[int], tokens: Many[int]) -> int:
    """How many guesses, from the first, are the tokens that were drawn."""
    count = 0
    for guess, token in zip(guesses, tokens, strict=False):
        if guess != token:
            break
        count += 1
    return count


def descend(
    guesses: Many[int], parents: Many[int], tokens: Many[int]
) -> tuple[list[int], list[int]]:
    """The path through a tree of certain guesses that the drawn tokens take.

    `tokens` has one for the answer's last token and one for each guess: what was drawn behind it.
    Gives the numbers of the accepted guesses, and the tokens that are said: theirs, and one more.
    """
    children: dict[tuple[int, int], int] = {}
    for number, (guess, parent) in enumerate(zip(guesses, parents, strict=True)):
        children.setdefault((parent, guess), number)
    path: list[int] = []
    at = -1
    said = [tokens[0]]
    while (following := children.get((at, said[-1]))) is not None:
        path.append(following)
        at = following
        said.append(tokens[at + 1])
    return path, said


def judge(
    target: torch.Tensor, drafted: torch.Tensor, guesses: Many[Many[int]], uniforms: Many[float]
) -> tuple[list[int], list[int]]:
    """How many guesses of each answer are accepted, and the token behind them.

    `target` [R, V] has the target's law, normalized: for each answer a row for each of its guesses
    and one behind the last. `drafted` [G, V] is the law that the guesses come from. `uniforms`
    has a number in [0, 1) for each row of `target`, all independent.
    """
    ids = [guess for one in guesses for guess in one]
    device = target.device
    starts: list[int] = []
    rows: list[int] = []
    at = 0
    for one in guesses:
        starts.append(at)
        rows += range(at, at + len(one))
        at += len(one) + 1
    if ids:
        chosen = torch.tensor(ids, device=device)[:, None]
        on_target = target[torch.tensor(rows, device=device)].gather(1, chosen)[:, 0]
        on_draft = drafted.gather(1, chosen)[:, 0]
        thrown = torch.tensor([uniforms[row] for row in rows], dtype=torch.float64, device=device)
        passed: list[bool] = (thrown * on_draft.double() < on_target.double()).tolist()
    else:
        passed = []
    accepted = []
    first = 0
    for one in guesses:
        fate = passed[first : first + len(one)]
        accepted.append(fate.index(False) if False in fate else len(one))
        first += len(one)
    return accepted, _behind(target, drafted, guesses, accepted, starts, uniforms)


def _behind(
    target: torch.Tensor,
    drafted: torch.Tensor,
    guesses: Many[Many[int]],
    accepted: Many[int],
    starts: Many[int],
    uniforms: Many[float],
) -> list[int]:
    """The token of each answer behind its accepted guesses: recovered, or a bonus."""
    device = target.device
    last = torch.tensor([s + a for s, a in zip(starts, accepted, strict=True)], device=device)
    law = target[last]
    refused = [at for at, one in enumerate(guesses) if accepted[at] < len(one)]
    if refused:
        # Guess number a of answer i is row starts[i] + a of the target, less a row for each before.
        theirs = torch.tensor([starts[at] + accepted[at] - at for at in refused], device=device)
        mine = torch.tensor(refused, device=device)
        rest = (law[mine] - drafted[theirs]).clamp_(min=0.0)
        # Rounding can leave nothing where both laws are the same; either of them is right then.
        empty = rest.sum(-1, keepdim=True) <= 0
        law[mine] = torch.where(empty, law[mine], rest)
    # The number that refused a guess is spent; the one behind the last is always fresh, and each
    # answer has more of them than it uses.
    fresh = [uniforms[start + len(one)] for start, one in zip(starts, guesses, strict=True)]
    return _invert(law, fresh)


def _invert(law: torch.Tensor, uniforms: Many[float]) -> list[int]:
    """The token at which each row's running sum passes its uniform share of the whole."""
    sums = law.cumsum(-1, dtype=torch.float64)
    whole = sums[:, -1:].contiguous()
    points = torch.tensor(uniforms, dtype=torch.float64, device=law.device)[:, None] * whole
    # right=True: a token of probability 0 is never chosen, whatever the uniform number is.
    at = torch.searchsorted(sums, points, right=True)[:, 0]
    # Nor behind the last possible one, where the product is rounded up to the whole.
    last = torch.searchsorted(sums, whole)[:, 0]
    tokens: list[int] = torch.minimum(at, last).tolist()
    return tokens
