"""The fingerprint: the same after a restart, another one for anything that can change an answer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from policies.model_facts import ENGINE, Facts, digest_files, read_weights, source_digest
from policies.schema import KvEvents, Runtime
from runtime.choices import Choices
from runtime.fingerprint import LEAVES, Fingerprint, arithmetic_facts, combine, take
from runtime.loading import load_model
from tests.runtime.tiny_models import FAMILIES, write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def of(folder: Path, **runtime: Any) -> Fingerprint:
    weights = read_weights(folder, folder / "no-such-folder" / "digests.json")
    return take(folder, weights, Runtime(**runtime), CPU, arithmetic={"threads": 1})


def change_byte(file: Path, at: int = -1) -> None:
    body = bytearray(file.read_bytes())
    body[at] ^= 1
    file.write_bytes(body)


def edit_token(folder: Path) -> None:
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["added_tokens"][0]["lstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokens))


def edit_config(folder: Path, **change: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def edit_rope(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5.0}))


CHANGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "one bit of the weights": ("weights", lambda at: change_byte(at / "model.safetensors")),
    "a rope": ("weights", edit_rope),
    "a token": ("tokenizer", edit_token),
    "an end token": ("tokenizer", lambda at: edit_config(at, eos_token="<user>")),
    "the template": ("template", lambda at: edit_config(at, chat_template="{{ messages }}")),
    "a template in a file": ("template", lambda at: (at / "chat_template.jinja").write_text("x")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_of_a_model_changes_one_leaf_and_the_root(folder: Path, change: str) -> None:
    before = of(folder)
    leaf, make = CHANGES[change]
    make(folder)
    after = of(folder)
    assert [name for name in LEAVES if before.leaves[name] != after.leaves[name]] == [leaf]
    assert (before.root, before.short) != (after.root, after.short)
    assert before.short != after.short


def test_the_same_model_elsewhere_after_a_restart_is_the_same(folder: Path, tmp_path: Path) -> None:
    """Where a model lies and when it was read do not count; what the policy changes does."""
    there = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "copy"))
    assert of(folder) == of(folder) == of(there, model="./copy", revision="v2")
    assert of(folder, kv_events=KvEvents(topic="x")) == of(folder)
    changed = of(folder, step_tokens=64)
    differing = [name for name in LEAVES if changed.leaves[name] != of(folder).leaves[name]]
    assert differing == ["configuration"]


def test_where_tiers_lie_does_not_count_but_that_there_are_some_does(folder: Path) -> None:
    """The folder of a disk tier changes no answer; its size is part of the configuration."""
    here, there, larger = (
        of(folder, tiers={"disk": {"path": path, "max_bytes": size}})
        for path, size in (("here", 2**30), ("/else/where", 2**30), ("here", 2**31))
    )
    assert here.root == there.root
    assert len({here.root, larger.root, of(folder).root}) == 3


class Last(Choices):
    """Takes the last of the ways, whatever is fastest."""

    def make(self, question: str, among: Sequence[str], measure: Callable[[], str]) -> str:
        return among[-1]


class First(Choices):
    """Takes the first one."""

    def make(self, question: str, among: Sequence[str], measure: Callable[[], str]) -> str:
        return among[0]


def test_how_sums_are_made_is_a_leaf(folder: Path, tmp_path: Path) -> None:
    """Layers held otherwise, another number of threads, and activations of another dtype."""

    def facts(kind: type[Choices], **how: Any) -> Facts:
        choices = kind(tmp_path / "ways.json", {})
        return arithmetic_facts(load_model(folder, kv_tokens=64, choices=choices, **how)[0])

    first = facts(First)
    assert facts(First) == first
    assert facts(Last)["layers"] != first["layers"]
    assert facts(First, dtype="bf16")["activations"] == "bfloat16" != first["activations"]
    told = {**first, "layers": None, "threads": None}
    assert {**facts(Last), "layers": None, "threads": None} == told
    assert first["threads"] == torch.get_num_threads()
    counted = [sum(held.values()) for held in first["layers"].values()]
    assert sum(counted) == load_model(folder, kv_tokens=64)[0].weights.held.total()


def test_every_leaf_counts_and_none_passes_for_another() -> None:
    """The root differs for each leaf that differs, is missing, or stands in another's place."""
    facts: dict[str, Any] = {name: {"of": name} for name in LEAVES}
    roots = {combine(facts).root}
    for name in LEAVES:
        roots.add(combine(facts | {name: {"of": "x"}}).root)
        roots.add(combine(facts | {name: None}).root)
    swapped = facts | {"tokenizer": facts["template"], "template": facts["tokenizer"]}
    roots.add(combine(swapped).root)
    assert len(roots) == 2 + 2 * len(LEAVES)
    alike = combine({name: {"of": "same"} for name in LEAVES})
    assert len(set(alike.leaves.values())) == len(LEAVES)


def test_the_recipe_in_the_documentation_gives_the_root(folder: Path) -> None:
    """Anyone can recompute leaves and root from the body of GET /v1/fingerprint."""
    body = json.loads(json.dumps(of(folder).payload()))
    root = hashlib.sha256(b"headgate fingerprint root 2\0")
    for name in (
        "weights", "draft", "tokenizer", "template", "engine", "device", "configuration",
        "arithmetic",
    ):  # fmt: skip
        facts = body["facts"][name]
        if facts is None:
            assert body["leaves"][name] is None
            root.update(name.encode() + b"\0")
            continue
        spelled = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        head = b"headgate fingerprint leaf 1\0" + name.encode() + b"\0"
        leaf = hashlib.sha256(head + spelled.encode())
        assert body["leaves"][name] == leaf.hexdigest()
        root.update(name.encode() + b"\1" + leaf.digest())
    assert body["root"] == root.hexdigest()
    assert body["system_fingerprint"] == "fp_" + body["root"][:12]


def test_only_the_weights_that_are_loaded_count(folder: Path) -> None:
    """A model in shards is what its index names; a stray file beside it is nobody's."""
    before = read_weights(folder)
    (folder / "original.safetensors").write_bytes(b"not loaded")
    assert read_weights(folder) == before
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(read_weights(folder)["files"]) == ["a.safetensors"]


def test_our_own_source_counts_by_name_and_text(tmp_path: Path) -> None:
    """A changed line, a renamed module and a moved boundary are each another engine."""
    for name, text in (("runtime/a.py", "x = 1\n"), ("cache/b.py", "y = 2\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    digests = [source_digest(ENGINE, tmp_path), source_digest(ENGINE, tmp_path)]
    (tmp_path / "runtime" / "a.py").write_text("x = 3\n")
    digests.append(source_digest(ENGINE, tmp_path))
    (tmp_path / "runtime" / "a.py").rename(tmp_path / "runtime" / "c.py")
    digests.append(source_digest(ENGINE, tmp_path))
    (tmp_path / "runtime" / "kernel.cpp").write_text("int x;\n")
    digests.append(source_digest(ENGINE, tmp_path))
    (tmp_path / "notes.py").write_text("not of a package\n")
    (tmp_path / "runtime" / "c.pyc").write_text("not source\n")
    assert source_digest(ENGINE, tmp_path) == digests[-1]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


# ---- digests kept between starts ----------------------------------------------------------------


def test_a_kept_digest_is_used_until_the_file_changes(tmp_path: Path) -> None:
    """The kept value is believed under the same size and times, and under no others."""
    file, kept = tmp_path / "w.safetensors", tmp_path / "new" / "digests.json"
    file.write_bytes(b"one")
    honest = digest_files([file], kept, kept_from_bytes=0)
    assert honest == [hashlib.sha256(b"one").hexdigest()]
    (name, entry) = next(iter(json.loads(kept.read_text()).items()))
    kept.write_text(json.dumps({name: [*entry[:3], "f" * 64]}))
    assert digest_files([file], kept, kept_from_bytes=0) == ["f" * 64]
    file.write_bytes(b"two")
    assert digest_files([file], kept, kept_from_bytes=0) == [hashlib.sha256(b"two").hexdigest()]
    assert digest_files([file], kept, kept_from_bytes=0) == [hashlib.sha256(b"two").hexdigest()]


@pytest.mark.parametrize("found", [b"", b"{", b"[1]", b'{"w": 3}', b"\xff\xfe"])
def test_a_cut_or_foreign_file_of_digests_costs_one_more_hash(tmp_path: Path, found: bytes) -> None:
    file, kept = tmp_path / "w.safetensors", tmp_path / "digests.json"
    file.write_bytes(b"one")
    kept.write_bytes(found)
    assert digest_files([file], kept, kept_from_bytes=0) == [hashlib.sha256(b"one").hexdigest()]
    assert str(file) in json.loads(kept.read_text())


def test_where_nothing_can_be_kept_everything_is_hashed(tmp_path: Path) -> None:
    """A read-only home is no reason not to serve."""
    file, blocked = tmp_path / "w.safetensors", tmp_path / "a-file"
    file.write_bytes(b"one")
    blocked.write_bytes(b"")
    kept = blocked / "digests.json"
    assert digest_files([file], kept, kept_from_bytes=0) == [hashlib.sha256(b"one").hexdigest()]


def test_small_files_are_not_kept(tmp_path: Path) -> None:
    """Pocket is hashed in a few milliseconds; nothing is written into anyone's home for it."""
    file, kept = tmp_path / "w.safetensors", tmp_path / "digests.json"
    file.write_bytes(b"one")
    assert digest_files([file], kept) == [hashlib.sha256(b"one").hexdigest()]
    assert not kept.exists()
