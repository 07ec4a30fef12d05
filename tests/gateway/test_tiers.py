"""Which tier a request is of, what it is promised, and what of that a replica is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from gateway.call import Call
from gateway.keys import ANYONE, Known
from gateway.tiers import Service, Tiers
from policies.schema import Gateway, Tenant, Tier
from policies.slo import key_hash
from runtime.wire import Problem
from tests.gateway.world import HELLO, gateway, on_loop, upstream

TIERS = Tiers.of(Gateway(), b"secret")
NAMES = tuple(TIERS.rules)


def known(*tiers: str) -> Known:
    return Known("t", Tenant(keys=(key_hash("k"),), tiers=tiers))


def tier(headers: dict[str, str] | None = None, tenant: Known = ANYONE, **data: Any) -> Service:
    return TIERS.tier(Call("/", "m", False, b"{}", headers or {}, None, data), tenant)


def test_a_request_that_says_nothing_is_standard_and_promises_nothing_to_a_replica() -> None:
    service = tier()
    assert (service.tier, service.ttft_ms, service.asked) == ("standard", 2000, False)


@pytest.mark.parametrize(
    ("wish", "found"),
    [
        ("priority", "interactive"), ("default", "standard"), ("flex", "relaxed"),
        ("auto", "standard"), ("scale", "standard"), (None, "standard"), (7, "standard"),
    ],
)  # fmt: skip
def test_openais_service_tier_names_ours(wish: object, found: str) -> None:
    assert tier(service_tier=wish).tier == found


def test_the_header_goes_before_the_field() -> None:
    assert tier({"x-headgate-tier": "batch"}, service_tier="priority").tier == "batch"


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"x-slo-ttft-ms": "8000"}, "relaxed"),
        ({"x-slo-ttft-ms": "2000"}, "standard"),
        ({"x-slo-ttft-ms": "1999"}, "interactive"),
        ({"x-slo-ttft-ms": "1"}, "interactive"),
        ({"x-slo-ttft-ms": "8000", "x-slo-tpot-ms": "50"}, "interactive"),
        ({"x-slo-tpot-ms": "120"}, "standard"),
        ({"x-slo-deadline-ms": "50"}, "standard"),
    ],
)
def test_targets_alone_choose_the_loosest_tier_that_promises_them(
    headers: dict[str, str], found: str
) -> None:
    assert tier(headers).tier == found


@pytest.mark.parametrize(
    ("allowed", "asked", "found"),
    [
        (("standard", "batch"), "interactive", "standard"),
        (("interactive", "batch"), "standard", "batch"),
        (("interactive",), "batch", "interactive"),
        (("batch",), None, "batch"),
        ((), None, "standard"),
        ((), "interactive", "interactive"),
    ],
)
def test_a_tier_beyond_a_tenants_rights_becomes_the_next_below(
    allowed: tuple[str, ...], asked: str | None, found: str
) -> None:
    headers = {"x-headgate-tier": asked} if asked else {}
    assert tier(headers, known(*allowed)).tier == found


@given(
    allowed=st.sets(st.sampled_from(NAMES)),
    named=st.sampled_from((*NAMES, None)),
    wish=st.sampled_from(("priority", "default", "flex", "auto", None)),
    ttft=st.none() | st.floats(0.1, 1e6),
    tpot=st.none() | st.floats(0.1, 1e6),
)
def test_no_request_of_a_tenant_gets_beyond_its_rights(
    allowed: set[str], named: str | None, wish: str | None, ttft: float | None, tpot: float | None
) -> None:
    """Whatever it says of itself: its tier is one of its own, its targets no tighter than that."""
    given_headers = {"x-headgate-tier": named, "x-slo-ttft-ms": ttft, "x-slo-tpot-ms": tpot}
    headers = {name: str(value) for name, value in given_headers.items() if value is not None}
    service = tier(headers, known(*sorted(allowed)), service_tier=wish)
    assert service.tier in (allowed or NAMES)
    rules = TIERS.rules[service.tier]
    for got, least in ((service.ttft_ms, rules.ttft_ms), (service.tpot_ms, rules.tpot_ms)):
        assert got is None if least is None else got is not None and got >= least


def test_on_this_machine_alone_a_tighter_target_is_anybodys_right() -> None:
    assert tier({"x-slo-ttft-ms": "200"}).ttft_ms == 200


def test_a_deadline_may_be_shortened_and_not_stretched() -> None:
    tiers = Tiers.of(Gateway(tiers={"standard": Tier(deadline_s=2)}), b"")
    for asked, found in (("500", 500), ("9000", 2000)):
        call = Call("/", "m", False, b"{}", {"x-slo-deadline-ms": asked})
        assert tiers.tier(call, ANYONE).deadline_ms == found


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-deadline-ms"])
@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1e99"])
def test_a_target_that_is_none_is_400(name: str, value: str) -> None:
    with pytest.raises(Problem) as caught:
        tier({name: value})
    assert (caught.value.status, caught.value.param) == (400, name)


@on_loop
async def test_an_unknown_tier_is_400_and_names_those_that_are() -> None:
    async with upstream() as fake, gateway(fake) as edge:
        response = await edge.post(HELLO, headers={"x-headgate-tier": "gold"})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unknown_tier")
        assert "interactive, standard, relaxed, batch" in error["message"]
        assert fake.requests == []


@on_loop
async def test_what_was_promised_goes_on_and_comes_back() -> None:
    """The replica reads it as headers, the client which tier it was; a priority of its own that a
    tenant sends counts nowhere."""
    tenants = {"acme": Tenant(keys=(key_hash("k"),), tiers=("relaxed", "batch"))}
    key = {"authorization": "Bearer k"}
    async with upstream() as fake, gateway(fake, tenants=tenants) as edge:
        sent = HELLO | {"priority": -1000, "service_tier": "priority"}
        response = await edge.post(sent, headers=key | {"x-slo-ttft-ms": "1", "x-slo-tpot-ms": "1"})
        assert response.headers["x-headgate-tier"] == "relaxed"
        got = fake.requests[-1]
        assert json.loads(got.body) == sent | {"priority": 2}
        names = ("x-headgate-tier", "x-headgate-priority", "x-slo-ttft-ms", "x-slo-tpot-ms")
        assert [got.headers[name] for name in names] == ["relaxed", "2", "5000", "150"]
        await edge.post(HELLO, headers=key | {"x-headgate-tier": "batch", "x-slo-ttft-ms": "9"})
        got = fake.requests[-1]
        assert [got.headers.get(name) for name in names] == ["batch", "3", None, None]


@on_loop
async def test_a_request_that_asks_for_nothing_goes_on_as_it_came() -> None:
    async with upstream() as fake, gateway(fake) as edge:
        response = await edge.post(HELLO, headers={"x-headgate-priority": "-5"})
        assert response.headers["x-headgate-tier"] == "standard"
        assert not [name for name in fake.requests[0].headers if "slo" in name or "headg" in name]
        assert json.loads(fake.requests[0].body) == HELLO
