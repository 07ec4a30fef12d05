"""Large tensors lie in large pages where there are some, and take no more memory than they need."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

from runtime.pages import zeros

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3,), (2 * MIB,), (3, 1000, 1001), (5 * MIB + 7,)])
def test_they_are_ordinary_zeros(shape, dtype):
    """Small and large, odd sizes: all zero, writable to the last element, and contiguous."""
    tensor = zeros(shape, dtype, CPU)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert not tensor.any()
    tensor.view(-1)[-1] = 1
    assert tensor.sum() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_they_are_private():
    """Most kernels give large pages to private memory that asks for them, and to shared memory
    never."""
    tensor = zeros((8 * MIB,), torch.int8, CPU)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (rights,) = [
        rights
        for addresses, rights, *_ in lines
        if int(addresses.partition("-")[0], 16)
        <= tensor.data_ptr()
        < int(addresses.partition("-")[2], 16)
    ]
    assert rights == "rw-p"


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_memory_is_taken_as_far_as_it_is_written():
    """A large tensor costs nothing at first, and once it is full no page more than its size."""
    process = psutil.Process()
    before = process.memory_info().rss
    tensor = zeros((65 * MIB + 1000,), torch.int8, CPU)
    assert process.memory_info().rss - before < 8 * MIB
    tensor.fill_(1)
    taken = process.memory_info().rss - before
    assert tensor.nbytes - MIB <= taken <= tensor.nbytes + 8 * MIB
