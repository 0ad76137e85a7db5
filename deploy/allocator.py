"""What glibc's allocator is told in processes that live long: the environment that they begin with.

With memory for each thread of its own, as glibc has it, the processes of a run grow for thousands of updates by gaps that are
never given back. And what is given back is asked for again by the next update, page by page."""

from __future__ import annotations

import contextlib
import ctypes

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
KEEPS_MEMORY = {
    # Larger arrays would be mapped and unmapped each time; this is the most that glibc takes.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    # Large pages: 512 times fewer faults where memory is new.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Of a learner on CPUs, whose arrays come and go with each update: up to 1 GiB stays its own between two of them. An update in
bfloat16 takes 0.95 of the time and no page fault (`tests/benchmarks/allocator_rate.py`); in float32, where the products take
most of it, as long."""
_M_ARENA_MAX = -8


def one_arena() -> None:
    """Of this process, from now on: arenas that it has already stay. Nothing where another C library allocates."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
