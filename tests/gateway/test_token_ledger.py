"""The token ledger's invariants, and that a server which miscounts is found out."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from gateway.token_ledger import INVARIANTS, STAGES, Entry, enter, violated
from tests.gateway.test_metrics import said, scraped, usage
from tests.gateway.world import DONE, STREAMED, Peer, gateway, on_loop, upstream

VIOLATIONS = "headgate_token_ledger_violations_total"
COUNTS = st.integers(0, 10_000)


@st.composite
def true_entries(draw: st.DrawFn) -> Entry:
    """What a request can really come to, with some of its counts not told."""
    trimmed, templated, accepted, sampled, rejected = (draw(COUNTS) for _ in range(5))
    emitted = accepted + sampled
    whole = Entry(
        received=templated + trimmed,
        trimmed=trimmed,
        counted=templated,
        templated=templated,
        cached=draw(st.integers(0, templated)),
        accepted=accepted,
        rejected=rejected,
        marked_accepted=accepted,
        marked_rejected=rejected,
        emitted=emitted,
        streamed=emitted,
        billed=templated + emitted,
        charged=templated + emitted,
        allowed=emitted + draw(COUNTS),
    )
    untold = draw(st.sets(st.sampled_from([n for n in Entry._fields if n != "trimmed"])))
    return whole._replace(**dict.fromkeys(untold))


@given(true_entries())
def test_what_is_true_breaks_no_invariant(entry: Entry) -> None:
    assert violated(entry) == []
    totals = dict.fromkeys(STAGES, 0)
    enter(totals, entry)
    assert totals == {name: getattr(entry, name) or 0 for name in STAGES}
    assert min(totals.values()) >= 0


TRUE = Entry(
    received=30, trimmed=10, counted=20, templated=20, cached=16, accepted=2, rejected=3,
    marked_accepted=2, marked_rejected=3, emitted=5, streamed=5, billed=25, charged=25, allowed=8,
)  # fmt: skip


MISCOUNTS = {
    "trimmed_within_received": {"trimmed": 31},
    "templated_as_counted": {"counted": 21},
    "cached_within_templated": {"cached": 21},
    "accepted_within_emitted": {"accepted": 6, "marked_accepted": 6},
    "accepted_as_marked": {"accepted": 3},
    "rejected_as_marked": {"rejected": 2},
    "emitted_as_streamed": {"streamed": 4},
    "emitted_within_allowed": {"allowed": 4},
    "billed_is_sum": {"billed": 24},
    "charged_is_sum": {"charged": 26},
}


@pytest.mark.parametrize("name", INVARIANTS)
def test_each_invariant_finds_its_miscount(name: str) -> None:
    assert violated(TRUE) == []
    assert violated(TRUE._replace(**MISCOUNTS[name])) == [name]


@on_loop
async def test_a_server_that_miscounts_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """A replica bills one token too many, and says that more was cached than the prompt has: each
    is counted under its name, and logged with the request's id; an honest one leaves no trace."""
    told = [
        usage(),
        usage(total_tokens=13, prompt_tokens_details={"cached_tokens": 10}),
    ]

    async def answer(peer: Peer) -> None:
        await peer.stream(said("a"), said("b"), said("c"), told.pop(0), DONE)

    async with upstream(answer) as fake, gateway(fake) as edge:
        await edge.post(STREAMED)
        found = await scraped(edge)
        assert not any(found[f"{VIOLATIONS} {name}"] for name in INVARIANTS)
        await edge.post(STREAMED, headers={"x-request-id": "the-second"})
        found = await scraped(edge)
        wrong = [name for name in INVARIANTS if found[f"{VIOLATIONS} {name}"]]
        assert wrong == ["cached_within_templated", "billed_is_sum"]
        assert found["headgate_token_ledger_requests_total"] == 2
    (line,) = [one.getMessage() for one in caplog.records if "do not add up" in one.getMessage()]
    assert "the-second" in line
    assert "cached_within_templated, billed_is_sum" in line


@on_loop
async def test_a_usage_is_held_against_the_marks_in_its_stream() -> None:
    """A replica that marks what its draft did, and then tells a right guess less and a wrong one
    more; the usage of an honest one agrees. Marks that are none count for nothing."""
    right = {"accepted_prediction_tokens": 1, "rejected_prediction_tokens": 3}
    wrong = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 4}
    told = [(right, True), (wrong, True), (wrong, False)]

    async def answer(peer: Peer) -> None:
        details, marked = told.pop(0)
        marks = [
            (b'"headgate":{"tokens":%d,"guessed":%d,"rejected":%d}' % mark)
            if marked
            else b'"headgate":{"guessed":"some"}'
            for mark in ((1, 0, 0), (2, 1, 3))
        ]
        chunks = [said("a").replace(b'"choices"', mark + b',"choices"') for mark in marks]
        await peer.stream(*chunks, usage(completion_tokens_details=details), DONE)

    async with upstream(answer) as fake, gateway(fake, resume="auto") as edge:
        violations = edge.live.edge.meters.violations
        await edge.post(STREAMED)
        assert not any(violations.values())
        await edge.post(STREAMED)
        await edge.post(STREAMED)
        wrong_ones = {name: count for name, count in violations.items() if count}
        assert wrong_ones == {"accepted_as_marked": 1, "rejected_as_marked": 1}
        assert edge.live.edge.meters.stages["drafted"] == 12
