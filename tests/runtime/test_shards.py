"""Safetensors as they lie in their files: mapped once, read as they are, refused when broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from runtime.loading import load_model
from runtime.shards import open_shards
from runtime.table import FileChanged, FileTable, StoredTable
from tests.runtime.tiny_models import FAMILIES, write_model

torch.set_num_threads(1)


def write(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def test_tensors_are_what_was_written(tmp_path):
    """Of every kind and shape, scalars and empty ones too."""
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    written = {str(kind): torch.randn(3, 5).to(kind) for kind in kinds}
    written |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    write(tmp_path, **written)
    shards = open_shards(tmp_path)
    assert shards.tensors.keys() == written.keys()
    for name, tensor in written.items():
        found = shards.tensors[name].to()
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


def test_casting_leaves_a_tensor_in_its_file(tmp_path):
    """A loader that asks for another dtype gets a plain tensor that still lies in the map."""
    file = write(tmp_path, a=torch.randn(4, 4).bfloat16())
    shards = open_shards(tmp_path)
    found = shards.tensors["a"][...].to(device="cpu", dtype=torch.float32)
    assert type(found) is torch.Tensor
    assert found.dtype == torch.bfloat16
    place = shards.place_of(found)
    assert place is not None
    assert place.file == file
    raw = file.read_bytes()[place.offset : place.offset + 32]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(4, 4), found)
    assert shards.place_of(found.float()) is None


def test_forgotten_tensors_are_read_again(tmp_path):
    """Giving the memory back changes no value."""
    weight = torch.randn(300, 300)
    write(tmp_path, a=weight)
    shards = open_shards(tmp_path)
    assert torch.equal(shards.tensors["a"].to(), weight)
    shards.forget()
    assert torch.equal(shards.tensors["a"].to(), weight)


def test_each_shard_is_opened_once(tmp_path):
    """A model of several files is loaded with one open a file."""
    folder = write_model(tmp_path / "model", *FAMILIES["llama"])
    whole = open_shards(folder).tensors
    names = sorted(whole)
    files = {f"model-0000{n}-of-00003.safetensors": names[n - 1 :: 3] for n in (1, 2, 3)}
    for file, some in files.items():
        save_file({name: whole[name].to().clone() for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    del whole
    (folder / "model.safetensors").unlink()
    opened = []
    listening = [True]

    def listen(event: str, arguments) -> None:
        if listening and event == "open" and str(arguments[0]).endswith(".safetensors"):
            opened.append(Path(str(arguments[0])).name)

    sys.addaudithook(listen)  # cannot be taken away again, only silenced
    try:
        load_model(folder, kv_tokens=64)
    finally:
        listening.clear()
    assert sorted(opened) == sorted(files)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: b"", "no header"),
        (lambda raw: raw[:4], "no header"),
        (lambda raw: b"\xff" * 8 + raw[8:], "no header"),
        (lambda raw: raw[:8] + b"[" + raw[9:], "unreadable header"),
        (lambda raw: raw[:-1], "'a' of model.safetensors lies outside the file"),
        (lambda raw: raw.replace(b'"F32"', b'"F99"'), "described in an unknown way"),
        (lambda raw: raw.replace(b"[4,4]", b"[4,5]"), "has another size than its shape"),
    ],
)
def test_a_broken_file_is_told(tmp_path, change, reason):
    """Whatever is wrong, it is a SafetensorError with a sentence, and nothing outside is read."""
    file = write(tmp_path, a=torch.randn(4, 4))
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises((SafetensorError, ValueError), match=reason):
        open_shards(tmp_path)


def test_tables_give_rows_in_the_dtype_of_activations(tmp_path):
    """From memory and from the file, in any shape of ids."""
    weight = torch.randn(50, 6).bfloat16()
    file = write(tmp_path, a=torch.randn(3), table=weight)
    shards = open_shards(tmp_path)
    stored = shards.tensors["table"].to()
    place = shards.place_of(stored)
    assert place is not None
    ids = torch.tensor([[3, 0, 49], [3, 7, 7]])
    expected = weight[ids].float()
    assert torch.equal(StoredTable(weight, torch.float32)(ids), expected)
    table = FileTable(file, place.offset, stored, torch.float32)
    assert torch.equal(table(ids), expected)
    assert table(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 0, 6)
    assert (table.num_embeddings, table.embedding_dim) == (50, 6)


def test_a_served_file_may_be_replaced_but_not_written_to(tmp_path):
    """A file that was moved over it leaves the old rows; one that was changed gives none."""
    weight = torch.randn(50, 6)
    file = write(tmp_path, table=weight)
    shards = open_shards(tmp_path)
    place = shards.place_of(shards.tensors["table"].to())
    assert place is not None
    table = FileTable(file, place.offset, weight, torch.float32)
    ids = torch.arange(50)
    other = tmp_path / "other"
    other.mkdir()
    write(other, table=weight + 1).replace(file)
    assert torch.equal(table(ids), weight)
    again = FileTable(file, place.offset, weight, torch.float32)
    with file.open("r+b") as opened:
        opened.truncate(place.offset + 10)
    with pytest.raises(FileChanged, match="written to while it is served"):
        again(ids)
