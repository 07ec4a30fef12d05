"""Where cached tokens get lost between what is there and what is found."""

from __future__ import annotations

from hypothesis import given, strategies as st

from gateway.ladder import Foreseen, Ladder, foresee


def test_each_loss_has_its_cause() -> None:
    """Replica a is down and has most, b has more than c, which is chosen and found less."""
    seen = foresee(1000, {"a": 50, "b": 40, "c": 30}, {"b", "c"}, "c")
    assert seen == Foreseen(prompt=1000, anywhere=800, available=640, captured=480)
    ladder = Ladder()
    ladder.served(seen, 1000, 320)
    told = {name: one for name, one in ladder.report().items() if one}
    assert told == {
        "requests": 1,
        "prompt": 1000,
        "anywhere": 800,
        "available": 640,
        "captured": 480,
        "delivered": 320,
        "unknown": 200,
        "down": 160,
        "load": 160,
        "evicted": 160,
    }


def test_what_nobody_knew_of_is_counted_apart() -> None:
    ladder = Ladder()
    ladder.served(foresee(100, {}, {"a"}, "a"), 100, 64)
    assert (ladder.unforeseen, ladder.evicted, ladder.unknown) == (64, 0, 100)


def test_a_server_that_tells_no_cached_tokens_is_no_loss() -> None:
    ladder = Ladder()
    ladder.served(foresee(100, {"a": 5}, {"a"}, "a"), 100, None)
    assert {name for name, one in ladder.report().items() if one} == {"untold"}


matches = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 100))


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2000), matches, st.sets(st.sampled_from("abcd"), min_size=1),
            st.integers(0, 2000),
        ),
        max_size=20,
    )
)  # fmt: skip
def test_the_rungs_and_their_causes_add_up(
    requests: list[tuple[int, dict[str, int], set[str], int]],
) -> None:
    """Rung by rung, whatever replicas have, are, and find."""
    ladder = Ladder()
    for prompt, known, taking, cached in requests:
        seen = foresee(prompt, known, taking, min(taking))
        ladder.served(seen, prompt, min(cached, prompt))
    assert ladder.prompt == ladder.anywhere + ladder.unknown
    assert ladder.anywhere == ladder.available + ladder.down
    assert ladder.available == ladder.captured + ladder.load
    assert ladder.captured == ladder.delivered + ladder.evicted - ladder.unforeseen
    assert all(one >= 0 for one in ladder.report().values())
