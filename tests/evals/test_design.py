"""Which requests run in which order."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, strategies as st

from evals.design import blocks_of_rows, blocks_of_time, steps
from evals.item import Item
from evals.pairs import AA, BASELINE, CANDIDATE, SABOTAGE
from policies.hypothesis import Design, Stats

SUITE, REPLAY = "suite:s", "replay:r"


def rows(count: int, turns: int = 1) -> list[Item]:
    """Conversations of so many turns."""
    return [
        Item(f"{at}.{turn}", f"c{at}", turn, {"messages": []})
        for at in range(count)
        for turn in range(turns)
    ]


def moments(*at_s: float) -> list[Item]:
    return [Item(f"{at}", f"{at}", 0, {}, meta={"t_s": at}) for at in at_s]


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 20), st.integers(1, 3))
def test_every_row_is_asked_once_a_repeat_and_conversations_stay_whole(
    count: int, turns: int, size: int, repeats: int
) -> None:
    design = Design(block_items=size, repeats=repeats)
    items = rows(count, turns)
    blocks = blocks_of_rows(SUITE, items, design, Stats())
    asked = Counter((item.id, block.repeat) for block in blocks for item in block.items)
    assert asked == Counter((item.id, repeat) for item in items for repeat in range(repeats))
    assert [block.number for block in blocks] == list(range(len(blocks)))
    for block in blocks:
        assert block.size <= max(size, turns)
        for session in block.sessions:
            assert [item.turn for item in session] == list(range(turns))
            assert len({item.cluster for item in session}) == 1


@given(st.integers(1, 50), st.integers(10, 40), st.integers(1, 3))
def test_no_more_pairs_are_asked_than_allowed(count: int, most: int, repeats: int) -> None:
    blocks = blocks_of_rows(SUITE, rows(count), Design(repeats=repeats), Stats(max_pairs=most))
    assert sum(block.size for block in blocks) == min(count, most // repeats) * repeats


def test_the_seed_decides_which_rows_and_in_which_order() -> None:
    """Twice the same seed is the same run, so that a run can be resumed and repeated."""
    design, items = Design(), rows(100)
    first, same, other = (
        blocks_of_rows(SUITE, items, design, Stats(seed=seed, max_pairs=50)) for seed in (1, 1, 2)
    )
    assert first == same
    assert {item.id for one in first for item in one.items} != {
        item.id for one in other for item in one.items
    }
    assert steps(first, design, Stats(seed=1)) == steps(same, design, Stats(seed=1))


@given(st.integers(2, 60), st.integers(0, 5))
def test_arms_mirror_each_other_in_pairs_of_blocks(count: int, seed: int) -> None:
    """A B B A: in each pair of blocks every arm stands as early in one as it stands late in the
    other, so that steady drift of the machine is the same for all.
    """
    design = Design(block_items=1, control_share=0.5)
    blocks = blocks_of_rows(SUITE, rows(count), design, Stats())
    planned = steps(blocks, design, Stats(seed=seed))
    for at in range(0, len(blocks) - 1, 2):
        first, second = (
            [step.arm for step in planned if step.block is block] for block in blocks[at : at + 2]
        )
        assert first == second[::-1]
        assert {BASELINE, CANDIDATE} <= set(first)


def test_both_orders_occur() -> None:
    """A B B A and B A A B: which one, the seed draws for each pair of blocks."""
    design = Design(block_items=1, aa_control=False, sabotage_control=False)
    planned = steps(blocks_of_rows(SUITE, rows(40), design, Stats()), design, Stats())
    assert {planned[at].arm for at in range(0, len(planned), 4)} == {BASELINE, CANDIDATE}


@given(st.integers(4, 400), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_control_arms_run_in_their_share_of_the_blocks(count: int, share: float) -> None:
    design = Design(block_items=1, control_share=share)
    planned = steps(blocks_of_rows(SUITE, rows(count), design, Stats()), design, Stats())
    arms = Counter(step.arm for step in planned)
    assert arms[BASELINE] == arms[CANDIDATE] == count
    assert arms[AA] == arms[SABOTAGE]
    assert arms[AA] >= min(count, 12)
    assert arms[AA] <= max(share * count + 2, 12)


def test_each_source_has_blocks_enough_in_the_control_arms() -> None:
    """What a small replay measures is not controlled by the blocks of a large suite beside it."""
    design = Design(block_items=1)
    large = blocks_of_rows(SUITE, rows(200), design, Stats())
    small = blocks_of_rows(REPLAY, rows(16), design, Stats())
    planned = steps((*large, *small), design, Stats())
    controlled = Counter(step.block.source for step in planned if step.arm == AA)
    assert controlled == {SUITE: 50, REPLAY: 12}


def test_where_caches_live_on_every_arm_is_asked_everything() -> None:
    """Else a control that skips blocks would find less cached than the baseline does."""
    design = Design(block_items=1, cold_blocks=False)
    planned = steps(blocks_of_rows(SUITE, rows(100), design, Stats()), design, Stats())
    assert Counter(step.arm for step in planned) == dict.fromkeys(
        (BASELINE, CANDIDATE, AA, SABOTAGE), 100
    )


def test_recorded_traffic_is_cut_by_its_own_clock() -> None:
    """A block without a request is none; the others keep where they began."""
    design = Design(block=60.0, repeats=2)
    blocks = blocks_of_time(REPLAY, moments(0.0, 59.0, 61.0, 200.0), design, Stats())
    shape = [(one.number, one.repeat, one.begin_s, one.size) for one in blocks]
    assert shape == [
        (0, 0, 0.0, 2), (1, 0, 60.0, 1), (2, 0, 180.0, 1),
        (3, 1, 0.0, 2), (4, 1, 60.0, 1), (5, 1, 180.0, 1),
    ]  # fmt: skip
