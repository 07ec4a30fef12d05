"""`runtime.model`: what it means, and what keeps a folder from being served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policies.leaves import _upstreams
from policies.load import (
    PolicyError,
    load,
    own_tokenizer,
    resolve_model,
    resolve_tokenizers,
)
from policies.model_folder import hub_folder, pocket_folder
from policies.schema import Deployment


def make(folder: Path, *names: str) -> Path:
    """A model folder with these files, as far as their names count."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


GOOD = ("config.json", "model.safetensors", "tokenizer.json")


def resolve(folder: Path, model: str) -> Path | str:
    file = folder / "policy.yaml"
    file.write_text(f"version: 1\nruntime:\n  model: {json.dumps(model)}\n")
    runtime = load(file).runtime
    assert runtime is not None
    return resolve_model(file, runtime)


def refusal(folder: Path, model: str) -> str:
    """What the error says after the place, which is always the model's line."""
    with pytest.raises(PolicyError) as caught:
        resolve(folder, model)
    start = f"{folder / 'policy.yaml'}:3:10  runtime.model  "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def test_a_folder_is_found_beside_the_policy_file(tmp_path: Path) -> None:
    """Relative to the file, not to where the command was typed."""
    for name in ("tiny", "models/tiny"):
        folder = make(tmp_path / name, *GOOD)
        assert resolve(tmp_path, name) == folder
        assert resolve(tmp_path, f"./{name}/") == folder
        assert resolve(tmp_path, str(folder)) == folder


def test_a_linked_folder_keeps_its_name(tmp_path: Path) -> None:
    """Clients send the last part of the name; the hub's cache has folders named by hash."""
    make(tmp_path / "0a1b2c", *GOOD)
    (tmp_path / "tiny").symlink_to("0a1b2c")
    assert Path(resolve(tmp_path, "tiny")).name == "tiny"


def test_owner_slash_name_is_a_hub_name_unless_the_owner_is_a_folder(tmp_path: Path) -> None:
    assert resolve(tmp_path, "owner/a-model_1.5") == "owner/a-model_1.5"
    make(tmp_path / "models" / "tiny", *GOOD)
    assert refusal(tmp_path, "models/tinny").endswith("did you mean 'models/tiny'?")


def test_what_looks_like_a_path_is_never_asked_of_the_hub(tmp_path: Path) -> None:
    for name in ("./a/b", "../a", "/nowhere/a", "~/nowhere/a", "a/b/c", "a/"):
        assert "no such folder" in refusal(tmp_path, name)
    assert "not a usable folder name" in refusal(tmp_path, "~no-such-person/a")
    assert "not a usable folder name" in refusal(tmp_path, "a" * 5000)
    assert "a\\x00b" in refusal(tmp_path, "a\0b")


def test_a_bare_word_is_close_to_pocket_or_to_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path, "pokcet").endswith("did you mean 'pocket'?")
    make(tmp_path / "tiny-llama", *GOOD)
    assert refusal(tmp_path, "tinyllama").endswith("did you mean 'tiny-llama'?")
    assert "nor a hub name such as owner/name" in refusal(tmp_path, "gpt2")


def test_pocket_is_the_folder_that_ships(tmp_path: Path) -> None:
    """Found without importing the package, and not shadowed by a folder of that name."""
    make(tmp_path / "pocket", *GOOD)
    shipped = pocket_folder()
    assert shipped.parts[-2:] == ("pocket", "target")
    try:
        assert resolve(tmp_path, "pocket") == shipped
    except PolicyError as error:  # a checkout whose weights are not made yet
        assert str(shipped) in str(error)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (("model.safetensors", "tokenizer.json"), "has no config.json"),
        (("config.json", "model.safetensors"), "has no tokenizer.json"),
        (("config.json", "tokenizer.json"), "has no weights: expected *.safetensors"),
        (("config.json", "pytorch_model.bin", "tokenizer.json"), "pickle files can run code"),
        (("config.json", "model.pth", "tokenizer.json"), "only safetensors are loaded"),
    ],
)
def test_a_folder_that_cannot_be_served_says_why(
    tmp_path: Path, files: tuple[str, ...], told: str
) -> None:
    make(tmp_path / "tiny", *files)
    assert told in refusal(tmp_path, "tiny")


def test_pickles_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    make(tmp_path / "tiny", *GOOD, "optimizer.pt")
    assert resolve(tmp_path, "tiny") == tmp_path / "tiny"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "tiny", "config.json", "tokenizer.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks 1 of 2 weight files: b.safetensors" in refusal(tmp_path, "tiny")


def test_a_file_or_broken_json_is_no_model_folder(tmp_path: Path) -> None:
    make(tmp_path, "tiny")
    assert "is a file, expected a Hugging Face folder" in refusal(tmp_path, "tiny")
    folder = make(tmp_path / "broken", *GOOD)
    for text, told in [("{", "cannot be read"), ("[]", "JSON object"), ("[" * 10**5, "be read")]:
        (folder / "config.json").write_text(text)
        assert told in refusal(tmp_path, "broken")


def cached(home: Path, name: str, commit: str = "c0ffee") -> Path:
    """A model as the hub's own client keeps it."""
    kept = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = kept / "snapshots" / commit
    folder.mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_tokenizer_is_found_by_a_name_of_the_hub_that_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For servers elsewhere and for own workers; one that was not is told with what fetches it,
    and a folder of that name comes first."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    file = tmp_path / "policy.yaml"
    file.write_text(
        "version: 1\nruntime: {model: org/model}\n"
        "upstreams: [{url: 'http://x', tokenizer: org/model}]\n"
    )
    assert own_tokenizer(file, load(file)) is None
    with pytest.raises(PolicyError) as caught:
        resolve_tokenizers(file, load(file))
    assert ":3:42  upstreams[0].tokenizer" in str(caught.value)
    assert "`hf download org/model --include" in str(caught.value)
    folder = cached(tmp_path / "home", "org/model")
    assert own_tokenizer(file, load(file)) == folder
    assert resolve_tokenizers(file, load(file)).upstreams[0].tokenizer == str(folder)
    assert hub_folder("org/model", "c0ffee") == folder
    assert hub_folder("org/model", "another") is None
    beside = tmp_path / "org" / "model"
    beside.mkdir(parents=True)
    (beside / "tokenizer.json").write_text("{}")
    assert resolve_tokenizers(file, load(file)).upstreams[0].tokenizer == str(beside)


def test_a_verdict_knows_a_tokenizer_of_the_hub_by_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named as on the hub or as a folder, it is the same one; another commit of it is not."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    first = cached(tmp_path / "home", "org/model")
    told = []
    for name in ("org/model", str(first), "org/model"):
        upstream = {"url": "http://x", "tokenizer": name}
        deployment = Deployment.model_validate({"version": 1, "upstreams": [upstream]})
        told.append(_upstreams(tmp_path, deployment)[0]["tokenizer"])
        (first / "tokenizer.json").write_text('{"another": 1}' if len(told) == 2 else "{}")
    assert told[0] == told[1] != told[2]
