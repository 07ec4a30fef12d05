"""How fast this machine streams memory: what decoding one sequence is bound by.

McCalpin's STREAM kernels on torch tensors far larger than any cache, and reading alone, which is
what a decode step does to the weights. Bytes are those that the kernel names; a processor that
reads a line before it writes it moves more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_ELEMENTS = 64 * 1024 * 1024  # fp32: 256 MiB a tensor
_REPEATS = 5


def stream_gb_s(threads: int) -> dict[str, float]:
    """GB/s of each kernel, the best of several, and `best` of them all."""
    torch.set_num_threads(threads)
    a, b, c = (torch.full((_ELEMENTS,), value) for value in (0.0, 1.0, 2.0))
    kernels: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (1, lambda: torch.sum(b)),
        "dot": (2, lambda: torch.dot(b, c)),
        "copy": (2, lambda: a.copy_(b)),
        "triad": (3, lambda: torch.add(b, c, alpha=3.0, out=a)),
    }
    told = {}
    for name, (tensors, kernel) in kernels.items():
        best_s = min(_seconds(kernel, threads) for _ in range(_REPEATS))
        told[name] = tensors * b.nbytes / best_s / 1e9
    told["best"] = max(told.values())
    return told


def _seconds(kernel: Callable[[], object], threads: int) -> float:
    """CPU seconds of each thread: what else the machine computes does not count."""
    started = time.process_time()
    kernel()
    return (time.process_time() - started) / threads
