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
    emitted=5, streamed=5, billed=25, charged=25, allowed=8,
)  # fmt: skip


MISCOUNTS = {
    "trimmed_within_received": {"trimmed": 31},
    "templated_as_counted": {"counted": 21},
    "cached_within_templated": {"cached": 21},
    "accepted_within_emitted": {"accepted": 6},
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
