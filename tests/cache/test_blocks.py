"""Two prompts share a hash exactly when they share all tokens up to its end, and the root."""

from __future__ import annotations

from hypothesis import given, strategies as st

from cache.blocks import BLOCK_TOKENS, chain_hashes, root_hash

ROOT = root_hash(model="m")
prompts = st.lists(st.integers(0, 3), max_size=70)


@given(one=prompts, other=prompts)
def test_hashes_agree_exactly_as_far_as_the_prompts_do(one, other):
    """The chain is as long as there are full blocks, and differs from the first difference on."""
    mine, theirs = chain_hashes(ROOT, one), chain_hashes(ROOT, other)
    assert len(mine) == len(one) // BLOCK_TOKENS
    for at, (left, right) in enumerate(zip(mine, theirs, strict=False)):
        end = (at + 1) * BLOCK_TOKENS
        assert (left == right) == (one[:end] == other[:end])
        assert len(left) == 32


@given(prompt=prompts, cut=st.integers(0, 4))
def test_a_chain_goes_on_from_any_of_its_blocks(prompt, cut):
    """What grows is hashed from its last full block on, with the same result."""
    whole = chain_hashes(ROOT, prompt)
    cut = min(cut, len(whole))
    parent = whole[cut - 1] if cut else ROOT
    assert whole[:cut] + chain_hashes(parent, prompt[cut * BLOCK_TOKENS :]) == whole


def test_the_root_tells_models_adapters_and_tenants_apart():
    """No two of them can be spelled so that they give one root."""
    roots = [
        root_hash(model="a"),
        root_hash(model="b"),
        root_hash(model="a", adapter="b"),
        root_hash(model="a", salt="b"),
        root_hash(model="a", adapter="b", salt="b"),
        root_hash(model="a", adapter=""),
        root_hash(model="ab"),
    ]
    assert len(set(roots)) == len(roots)


def test_the_hashes_are_those_of_every_machine_and_version():
    """The index of a gateway and the disk of a worker outlive the process that wrote them."""
    (one,) = chain_hashes(root_hash(model="m"), list(range(16)))
    assert one.hex().startswith("179dd2d53efae792")
