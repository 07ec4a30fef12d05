"""Blocks of the KV pool can be copied out and in, byte for byte."""

from __future__ import annotations

import pytest
import torch

from runtime.attention import Span, lay_out
from runtime.loading import load_model
from tests.runtime.tiny_models import FAMILIES, write_model

torch.set_num_threads(1)
PROMPT = list(range(3, 43))  # two full blocks and a half


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), *FAMILIES["llama"])


def model_of(folder, dtype: str = "fp32"):
    return load_model(folder, kv_tokens=256, dtype=dtype)[0]


def logits(model, ids: list[int], first: int, blocks: list[int]) -> torch.Tensor:
    """The last token's logits when `ids` stand at positions `first` and after."""
    end = first + len(ids)
    layout = lay_out([Span(end, len(ids), blocks)], model.device)
    return model.forward(ids, list(range(first, end)), layout, [len(ids) - 1])[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_blocks_copied_out_and_into_other_places_give_the_same_logits(folder, dtype):
    """A prompt goes on from copies of its blocks, in another model, at other block numbers."""
    model = model_of(folder, dtype)
    logits(model, PROMPT, 0, [7, 2, 11])
    expected = logits(model, [99], len(PROMPT), [7, 2, 11])
    buffers = model.read_blocks([2, 7, 11])
    other = model_of(folder, dtype)
    other.write_blocks([4, 0, 5], buffers)
    assert torch.equal(logits(other, [99], len(PROMPT), [0, 4, 5]), expected)


def test_a_block_is_one_buffer_of_the_promised_size(folder):
    """Tiers count on it: contiguous bytes in host memory, each buffer with memory of its own."""
    model = model_of(folder)
    buffers = model.read_blocks([3, 1])
    for buffer in buffers:
        assert buffer.dtype == torch.uint8
        assert buffer.device.type == "cpu"
        assert buffer.is_contiguous()
        assert buffer.shape == (model.block_bytes,)
        assert buffer.untyped_storage().nbytes() == model.block_bytes
    assert model.block_bytes * (model.blocks + 1) == model.kv_bytes  # one takes what is not kept


def test_a_copy_does_not_change_with_the_pool(folder):
    """What was copied out stays what it was when its block is wiped or overwritten."""
    model = model_of(folder)
    logits(model, PROMPT, 0, [0, 1, 2])
    (buffer,) = model.read_blocks([1])
    before = buffer.clone()
    model.wipe([1])
    assert torch.equal(buffer, before)
    assert not model.read_blocks([1])[0].any()
    model.write_blocks([1], [buffer])
    assert torch.equal(model.read_blocks([1])[0], before)


def test_a_buffer_of_another_size_is_refused_and_nothing_is_written(folder):
    """A truncated buffer, or one of another model, never reaches the pool."""
    model = model_of(folder)
    whole = torch.ones(model.block_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"block 1 wants {model.block_bytes} bytes"):
        model.write_blocks([0, 1], [whole, whole[:-1]])
    with pytest.raises(ValueError, match="1 buffers for 2 blocks"):
        model.write_blocks([0, 1], [whole])
    assert not model.read_blocks([0])[0].any()


def test_blocks_of_another_format_say_so(folder):
    """What is kept of blocks elsewhere is found again by this: type, shape and number of layers."""
    fp32, again, bf16 = model_of(folder), model_of(folder), model_of(folder, "bf16")
    assert fp32.block_format == again.block_format
    assert fp32.block_format.startswith("3 x keys torch.float32 (2, 16, 16) values")
    assert bf16.block_format != fp32.block_format
