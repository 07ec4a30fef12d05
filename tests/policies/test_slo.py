"""Tiers and tenants of a policy file: what ships, what a file changes, what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.load import PolicyError, admin_problems, key_problems, load
from policies.slo import key_hash, new_key

HASH = key_hash("one")
OTHER = key_hash("another")


def problems(file: Path, text: str) -> str:
    file.write_text("version: 1\nruntime: {model: pocket}\n" + text)
    with pytest.raises(PolicyError) as caught:
        load(file)
    return str(caught.value)


def test_four_tiers_ship_and_a_file_changes_what_it_names(tmp_path: Path) -> None:
    """What it does not say of a shipped tier stays; a new tier begins with plain defaults."""
    file = tmp_path / "p.yaml"
    tiers = "{interactive: {ttft_ms: 300}, gold: {tpot_ms: 20}}"
    file.write_text(f"version: 1\nruntime: {{model: pocket}}\ngateway: {{tiers: {tiers}}}\n")
    found = load(file).gateway.tiers
    assert {name: (tier.ttft_ms, tier.tpot_ms) for name, tier in found.items()} == {
        "interactive": (300, 30),
        "standard": (2000, 100),
        "relaxed": (5000, 150),
        "batch": (None, None),
        "gold": (None, 20),
    }
    assert found["interactive"].priority == 0
    assert found["interactive"].model_fields_set == {"ttft_ms"}


def test_strangers_are_served_only_with_keys_and_the_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    open_to_all = "gateway:\n  port: 80\n  host: 0.0.0.0\n"
    assert f"{file}:5:9  gateway.host  '0.0.0.0' is not a loopback" in problems(file, open_to_all)
    file.write_text(file.read_text() + f"  tenants: {{acme: {{keys: [{HASH}]}}}}\n")
    assert load(file).gateway.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("gateway", "complaint"),
    [
        ("tenants: {a: {keys: [sk-secret]}}", "gateway.tenants.a.keys[0]  expected text that matc"),
        ("tenants: {a: {keys: []}}", "gateway.tenants.a.keys  a tenant needs a key"),
        ("response_cache: {tiers: [gold]}", "response_cache.tiers[0]  there is no tier 'gold'"),
        (
            "record: {consent: given, tenants: [who]}",
            "record.tenants[0]  there is no tenant 'who'; expected one of none",
        ),
        ("record: {path: x}", "record.consent  missing"),
        ("record: {consent: given, patterns: ['(']}", "is no regular expression"),
        ("record: {consent: given, patterns: ['x*']}", "matches the empty text"),
        ("record: {consent: given, max_bytes: 8 MiB}", "four files of `file_bytes`"),
        ("trim: {tiers: {gold: {drop: oldest}}}", "trim.tiers.gold  there is no tier 'gold'"),
        (f"tenants: {{a: {{keys: [{HASH}], tiers: [gold]}}}}", "tiers[0]  there is no tier 'gold'"),
        (
            f"tenants: {{a: {{keys: [{HASH}]}}, b: {{keys: [{OTHER}, {HASH}]}}}}",
            "gateway.tenants.b.keys[1]  this key belongs to the tenant 'a' already",
        ),
        ("tiers: {batch: {reserved_share: 0.95}}", "gateway.tiers  the reserved shares of all"),
        ("tiers: {Batch!: {}}", "gateway.tiers.Batch!"),
        ("tiers: {batch: {ttft: 3}}", "gateway.tiers.batch.ttft  unknown field"),
    ],
)
def test_what_does_not_fit_is_told_at_its_place(
    tmp_path: Path, gateway: str, complaint: str
) -> None:
    text = problems(tmp_path / "p.yaml", f"gateway:\n  {gateway}\n")
    assert ":4:" in text
    assert complaint in text


def test_a_secret_that_is_not_set_is_told_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("version: 1\nruntime: {model: pocket}\ngateway: {secret_env: SALT}\n")
    (problem,) = key_problems(file, load(file), {})
    assert str(problem) == (
        f"{file}:3:23  gateway.secret_env  the environment variable SALT is not set, or empty"
    )
    assert not key_problems(file, load(file), {"SALT": "x"})


def test_an_admin_key_that_a_client_has_is_refused(tmp_path: Path) -> None:
    """By the name of its variable as the policy is read, by its value where both can be seen: in
    the environment, or as a hash in the policy. No key is told."""
    text = problems(
        tmp_path / "p.yaml",
        "gateway:\n  tenants: {shop: {key_env: KEY}}\n  admin: {key_env: KEY}\n",
    )
    assert ":5:20  gateway.admin.key_env  the tenant 'shop' has its key from KEY, too" in text
    assert "name another variable" in text

    file = tmp_path / "policy.yaml"
    file.write_text(
        "version: 1\nruntime: {model: pocket}\ngateway:\n  tenants:\n    shop: {key_env: SHOP}\n"
        f"    desk: {{keys: [{key_hash('hg-desk')}]}}\n  admin: {{key_env: ADMIN}}\n"
    )
    policy = load(file)
    for environ, tenant in (
        ({"SHOP": "hg-shop", "ADMIN": "hg-shop\n"}, "shop"),
        ({"SHOP": "hg-shop", "ADMIN": "hg-desk"}, "desk"),
    ):
        for told in (key_problems(file, policy, environ), admin_problems(file, policy, environ)):
            (problem,) = told
            assert str(problem).startswith(
                f"{file}:7:20  gateway.admin.key_env  the environment variable ADMIN holds the "
                f"key of the tenant '{tenant}', too: its clients could steer rollouts"
            )
            assert "headgate policy key" in problem.message
            assert not any(key in str(problem) for key in environ.values())
    assert not key_problems(file, policy, {"SHOP": "hg-shop", "ADMIN": "hg-admin"})
    assert not admin_problems(file, policy, {})
    assert not admin_problems(file, policy, {"SHOP": "", "ADMIN": ""})


def test_a_new_key_is_long_and_new() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= 43 and key.startswith("hg-") for key in keys)
