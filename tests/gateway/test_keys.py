"""Keys: who has none gets nothing, whose is whose, and no key goes further than the door."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.discovery import sources_of
from gateway.doorway import visitor
from gateway.keys import ANYONE, Keys, Known, salt_secret
from gateway.reload import fleet_source
from gateway.replica import Replica
from policies.admin import Admin
from policies.load import FLEET_KEY_ENV
from policies.schema import Discovery, Gateway, Tenant
from policies.slo import key_hash
from runtime.wire import RUN_TOKEN_ENV, Problem
from tests.gateway.world import HELLO, gateway, on_loop, upstream

ACME = {"authorization": "Bearer hg-acme"}


def tenants(**more: dict[str, Any]) -> dict[str, Tenant]:
    """Each with the key `hg-NAME`."""
    return {
        name: Tenant(keys=(key_hash(f"hg-{name}"),), **fields)
        for name, fields in ({"acme": {}, "rival": {}} | more).items()
    }


def test_without_tenants_everybody_is_anyone() -> None:
    assert Keys.of(Gateway()).tenant([]) is ANYONE


def test_a_key_names_its_tenant_whatever_the_scheme_is_spelled_like() -> None:
    keys = Keys.of(Gateway(tenants=tenants()))
    for scheme in (b"Bearer ", b"bearer ", b"BEARER  "):
        assert keys.tenant([(b"authorization", scheme + b"hg-rival")]).name == "rival"


def test_a_tenant_s_key_may_come_from_the_environment() -> None:
    """As containers get theirs; an empty one opens nothing."""
    named = Gateway(tenants=tenants() | {"acme": Tenant(key_env="ACME")})
    keys = Keys.of(named, {"ACME": " hg-env\n"})
    assert keys.tenant([(b"authorization", b"Bearer hg-env")]).name == "acme"
    with pytest.raises(Problem):
        Keys.of(named, {"ACME": ""}).tenant([(b"authorization", b"Bearer ")])


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer hg-acm")],
        [(b"authorization", b"Bearer hg-acmee")],
        [(b"authorization", b"Basic hg-acme")],
        [(b"authorization", b"Bearer " + key_hash("hg-acme").encode())],
        [(b"authorization", b"Bearer \xff\x00")],
        [(b"authorization", b"Bearer hg-acme"), (b"authorization", b"Bearer hg-rival")],
        [(b"x-api-key", b"hg-acme")],
    ],
)
def test_anything_else_is_401(headers: list[tuple[bytes, bytes]]) -> None:
    """Two keys are none: of a pair, another program might read the other one."""
    with pytest.raises(Problem) as caught:
        Keys.of(Gateway(tenants=tenants())).tenant(headers)
    assert caught.value.status == 401
    assert caught.value.headers == {"www-authenticate": "Bearer"}


@on_loop
async def test_without_a_key_no_path_tells_anything() -> None:
    """Before the body is read; /health says only that it is well."""
    async with upstream() as fake, gateway(fake, tenants=tenants()) as edge:
        for path in ("/v1/models", "/v1/models/m", "/v1/fingerprint", "/nothing"):
            response = await edge.client.get(path)
            assert response.status_code == 401, path
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == "missing_api_key"
        response = await edge.post(b"{", headers={"authorization": "Bearer guess"})
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        health = (await edge.client.get("/health")).json()
        assert health == {"status": "ready", "replicas": [{"healthy": True}]}
        assert fake.url in (await edge.client.get("/health", headers=ACME)).text
        assert (await edge.client.get("/v1/models", headers=ACME)).status_code == 200
        assert fake.requests == []


@on_loop
async def test_with_keys_any_name_and_page_may_ask_and_needs_one() -> None:
    """No page knows a key, so that Host and Origin tell nothing any more."""
    foreign = {"host": "api.example.org", "origin": "https://app.example.org"}
    async with upstream() as fake, gateway(fake, tenants=tenants()) as edge:
        assert (await edge.post(HELLO, headers=foreign)).status_code == 401
        assert (await edge.post(HELLO, headers=foreign | ACME)).status_code == 200


@on_loop
async def test_a_tenants_key_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    """Neither to own workers nor to others' servers, nor into the log."""
    with caplog.at_level(logging.DEBUG):
        async with (
            upstream() as own,
            upstream(models=("other",)) as other,
            gateway(own, Replica(other.url), tenants=tenants()) as edge,
        ):
            for fake, model in ((own, "m"), (other, "other")):
                response = await edge.post(HELLO | {"model": model}, headers=ACME)
                assert response.status_code == 200
                (request,) = fake.requests
                assert "hg-acme" not in str(request)
    assert "hg-acme" not in caplog.text


@on_loop
async def test_an_isolated_tenants_salt_is_nobody_elses() -> None:
    """The same request of two tenants, and of one tenant's two users: four salts, each its own
    again, and a salt that stands there cannot name another tenant's."""
    everyone = tenants(acme={"isolate": True}, rival={"isolate": True}, plain={})
    async with upstream() as fake, gateway(fake, tenants=everyone) as edge:

        async def salt_of(tenant: str, **more: Any) -> Any:
            key = {"authorization": f"Bearer hg-{tenant}"}
            assert (await edge.post(HELLO | more, headers=key)).status_code == 200
            body = json.loads(fake.requests[-1].body)
            salt = body.pop("cache_salt", None)
            assert body == HELLO
            return salt

        acme, rival = await salt_of("acme"), await salt_of("rival")
        user = await salt_of("acme", cache_salt="user")
        stolen = await salt_of("rival", cache_salt=acme)
        odd = await salt_of("acme", cache_salt=None)
        assert len({acme, rival, user, stolen}) == 4
        assert odd == acme
        assert await salt_of("acme", cache_salt="user") == user
        assert await salt_of("plain") is None
        assert await salt_of("plain", cache_salt="own") == "own"


@on_loop
async def test_a_salt_written_twice_or_with_escapes_does_not_slip_by() -> None:
    everyone = tenants(acme={"isolate": True})
    async with upstream() as fake, gateway(fake, tenants=everyone) as edge:
        body = b'{"model":"m","cache_salt":"a","messages":[{}],"cache\\u005fsalt":"b"} \n'
        assert (await edge.post(body, headers=ACME)).status_code == 200
        sent = fake.requests[-1].body
        assert sent.count(b"salt") == 1
        assert json.loads(sent)["cache_salt"] not in ("a", "b")


def test_salts_are_made_of_the_policys_secret_or_of_the_runs() -> None:
    """Gateways that know the same secret make the same salts; without one each makes its own."""
    named = Gateway(secret_env="S")
    assert salt_secret(named, {"S": "x"}) == salt_secret(named, {"S": "x"})
    assert salt_secret(named, {"S": "x"}) != salt_secret(named, {"S": "y"})
    run = {"HEADGATE_RUN_TOKEN": "t"}
    assert salt_secret(Gateway(), run) == salt_secret(Gateway(), run)
    assert salt_secret(Gateway(), {}) != salt_secret(Gateway(), {})


def test_our_own_fleet_reads_metrics_with_its_key_and_nothing_else() -> None:
    """It scales by them; its key opens no other path, and without a fleet there is none."""
    policy = Gateway(host="0.0.0.0", tenants={"acme": Tenant(keys=("0" * 64,))})
    fleet = Keys.of(policy, {FLEET_KEY_ENV: "sesame"})
    edge: Any = SimpleNamespace(keys=fleet, settings=policy)
    right = [(b"authorization", b"Bearer sesame")]

    def asked(path: str, headers: list[tuple[bytes, bytes]]) -> Known | None:
        return visitor({"path": path, "headers": headers}, edge)

    assert asked("/metrics", right) is None
    for path, headers in (
        ("/metrics", []),
        ("/metrics", [(b"authorization", b"Bearer sesam")]),
        ("/metrics", [*right, *right]),
        ("/v1/models", right),
    ):
        with pytest.raises(Problem):
            asked(path, headers)
    assert not Keys.of(policy, {}).is_fleet(right)


@pytest.mark.parametrize("named", [False, True])
@on_loop
async def test_metrics_are_the_operators_where_there_is_one(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They tell of all tenants together: the admin's key opens them, and a tenant's no more. Where
    no such key is named, tenants read them."""
    monkeypatch.setenv("OPERATOR", "hg-operator")
    operator = {"authorization": "Bearer hg-operator"}
    admin = {"admin": Admin(key_env="OPERATOR")} if named else {}
    async with upstream() as fake, gateway(fake, tenants=tenants(), **admin) as edge:
        for headers, opens in (({}, False), (operator, named), (ACME, not named)):
            response = await edge.client.get("/metrics", headers=headers)
            assert response.status_code == (200 if opens else 401), headers
        assert (await edge.client.get("/v1/models", headers=operator)).status_code == 401


def test_workers_of_our_own_fleet_must_prove_that_they_are(tmp_path: Path) -> None:
    """They get its key and have to know its token; replicas of the policy's own lists need not."""
    tokens = {FLEET_KEY_ENV: "sesame", RUN_TOKEN_ENV: "token", "KEY": "other"}
    listed = Discovery(file="more.yaml", kind="headgate", api_key_env="KEY")
    ours, theirs = sources_of((fleet_source(tmp_path / "r.yaml", None), listed), tokens)
    assert (ours.own, ours.api_key, ours.run_token) == (True, "sesame", "token")
    assert (theirs.own, theirs.api_key, theirs.run_token) == (False, "other", None)
