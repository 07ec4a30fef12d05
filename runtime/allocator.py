"""The C library's allocator while a model is loaded: what is freed leaves the process at once.

Knows glibc's settings; with another C library nothing changes. Weights of many sizes come and go
during a load, and would leave holes in the heap, a tenth of the model altogether.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# From malloc.h. Blocks above the threshold are mapped, each by itself.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_WHILE_LOADING_BYTES = 256 * 1024
# What glibc's own adaptation ends at after large blocks were freed: activations stay in the heap.
_WHILE_SERVING_BYTES = 32 * 2**20


@contextmanager
def giving_back() -> Iterator[None]:
    """Inside, freed blocks of weights return to the system, and at the end what else is free."""
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_MMAP_THRESHOLD, _WHILE_LOADING_BYTES)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _WHILE_SERVING_BYTES)
        mallopt(_TRIM_THRESHOLD, 2 * _WHILE_SERVING_BYTES)
        trim(0)
