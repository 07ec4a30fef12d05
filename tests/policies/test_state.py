"""`gateway.store` and `gateway.processes`: what a policy file may say, and how it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.load import PolicyError, key_problems, load

START = "version: 1\nruntime: {model: pocket}\ngateway: "


def write(folder: Path, gateway: str) -> Path:
    file = folder / "policy.yaml"
    file.write_text(START + gateway + "\n")
    return file


def test_a_store_is_a_url_and_nothing_more_is_needed(tmp_path: Path) -> None:
    store = load(write(tmp_path, "{store: {redis: 'redis://cache:6379/1'}}")).gateway.store
    assert store is not None
    assert (store.timeout_ms, store.when_down, store.namespace) == (20, "local", "headgate")


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("{}", "gateway.store.redis"),
        ("{redis: 'http://cache'}", "not a URL such as redis://"),
        ("{redis: 'redis://cache/one'}", "not a URL such as redis://"),
        ("{redis: 'redis://[::1'}", "not a URL such as redis://"),
        ("{redis: 'redis://me:secret@cache'}", "password_env"),
        ("{redis: 'redis://cache?ssl_cert_reqs=none'}", "a query or a fragment"),
        ("{redis: 'redis://cache', when_down: maybe}", "gateway.store.when_down"),
        ("{redis: 'redis://cache', namespace: 'a b'}", "gateway.store.namespace"),
        ("{redis: 'redis://cache', timeout_ms: 0}", "gateway.store.timeout_ms"),
    ],
)
def test_a_wrong_store_is_told(tmp_path: Path, store: str, told: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load(write(tmp_path, f"{{store: {store}}}"))
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_password_that_is_not_set_is_told_at_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, "\n  store:\n    redis: redis://cache\n    password_env: NO_SUCH")
    (problem,) = key_problems(file, load(file), {})
    assert str(problem).startswith(f"{file}:6:19  gateway.store.password_env")
    assert not key_problems(file, load(file), {"NO_SUCH": "word"})


@pytest.mark.parametrize("processes", ["0", "65", "true", "'4'"])
def test_processes_are_a_number_within_reason(tmp_path: Path, processes: str) -> None:
    with pytest.raises(PolicyError, match=r"gateway\.processes"):
        load(write(tmp_path, f"{{processes: {processes}}}"))
