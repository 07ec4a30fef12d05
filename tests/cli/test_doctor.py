"""`headgate doctor`: a table that is true, and quick because it never imports torch."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from command.screen import size
from command.versions import within
from command.weights import kv_bytes, weights_of
from policies.model_folder import ModelError

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "headgate", "doctor", *arguments],
        cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def tensors(file: Path, **shapes: list[int]) -> None:
    """A safetensors file of zeros in F32."""
    header, end = {}, 0
    for name, shape in shapes.items():
        count = 1
        for extent in shape:
            count *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


CONFIG = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
}  # fmt: skip


def policy_with_a_model(folder: Path) -> Path:
    model = folder / "tiny"
    model.mkdir()
    tensors(model / "model.safetensors", a=[64, 64], b=[10])
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "tokenizer.json").write_text("{}")
    file = folder / "policy.yaml"
    file.write_text("version: 1\nruntime: {model: tiny, kv_tokens: 1024, dtype: fp32}\n")
    return file


def test_what_would_run_is_told_without_torch(tmp_path: Path) -> None:
    """Also the pool's size: 2 x 2 layers x 2 heads x 16 x 4 bytes x 1024 tokens."""
    done = doctor(str(policy_with_a_model(tmp_path)), "--json")
    report = json.loads(done.stdout)
    found = {finding["what"]: finding for finding in report["findings"]}
    assert found["KV pool"]["found"] == "1024 tokens, 512.0 KiB in fp32 for each worker"
    assert "0.0 M parameters, F32" in found["model"]["found"]
    assert found["would run"]["state"] == "ok"
    assert done.returncode == (0 if report["ok"] else 1)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "tokenizers", "numpy", "aiohttp"}


def test_each_problem_of_the_policy_is_a_line_with_a_next_step(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("version: 1\nruntme: {}\nport: 1\n")
    done = doctor(str(file))
    assert done.returncode == 1
    assert f"{file}:2:1  runtme" in done.stdout
    assert f"{file}:3:1  port" in done.stdout
    assert "-> mend it" in done.stdout
    assert "wrong" in done.stdout.splitlines()[-1]


def test_a_junk_port_is_a_finding(tmp_path: Path) -> None:
    done = doctor(str(policy_with_a_model(tmp_path)), HEADGATE_PORT="x")
    assert done.returncode == 1
    assert "expected a port" in done.stdout


def test_a_key_that_is_not_set_is_wrong(tmp_path: Path) -> None:
    """`serve` would not start; an upstream without a key is fine."""
    file = tmp_path / "policy.yaml"
    keyed = "{url: 'http://y:1', api_key_env: NO_SUCH_KEY}"
    file.write_text(f"version: 1\nupstreams: [{{url: 'http://x:1'}}, {keyed}]\n")
    done = doctor(str(file), "--json", NO_SUCH_KEY="")
    found = [row for row in json.loads(done.stdout)["findings"] if row["what"] == "upstream"]
    assert [row["state"] for row in found] == ["wrong", "ok"]
    assert "upstreams[1].api_key_env  the environment variable NO_SUCH_KEY" in found[0]["found"]
    assert done.returncode == 1


def test_weights_are_counted_from_headers(tmp_path: Path) -> None:
    tensors(tmp_path / "a.safetensors", x=[3, 5], y=[])
    tensors(tmp_path / "b.safetensors", z=[7])
    weights = weights_of(tmp_path)
    assert weights.parameters == 15 + 1 + 7
    assert weights.dtypes == ("F32",)


@pytest.mark.parametrize(
    "body", [b"", b"version https://git-lfs", b"\xff" * 16, struct.pack("<Q", 2) + b"[]"]
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, body: bytes) -> None:
    """A pointer of git-lfs, half a download, something else."""
    (tmp_path / "model.safetensors").write_bytes(body)
    with pytest.raises(ModelError, match="is no safetensors file"):
        weights_of(tmp_path)


def test_half_a_download_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors(file, x=[100])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut short"):
        weights_of(tmp_path)


def test_the_pool_follows_the_config() -> None:
    assert kv_bytes(CONFIG, 1, 2) == 2 * 2 * 2 * 16 * 2
    assert kv_bytes(CONFIG | {"head_dim": 32}, 1, 2) == 2 * 2 * 2 * 32 * 2
    assert kv_bytes({"num_hidden_layers": 2}, 1, 2) is None


@pytest.mark.parametrize(
    ("have", "bounds", "kept"),
    [
        ("5.23.0", ">=5.17,<6", True),
        ("6.0", ">=5.17,<6", False),
        ("5.9", ">=5.17,<6", False),
        ("2.13.0+cpu", ">=2.11", True),
        ("2", ">=2.0.0", True),
        ("1.0rc1", "", True),
    ],
)
def test_versions_are_compared_by_numbers(have: str, bounds: str, kept: bool) -> None:
    assert within(have, bounds) is kept


def test_sizes_are_told_as_people_read_them() -> None:
    assert [size(n) for n in (5, 2048, 3 * 2**20, 2**40)] == [
        "5 bytes", "2.0 KiB", "3.0 MiB", "1.0 TiB",
    ]  # fmt: skip
