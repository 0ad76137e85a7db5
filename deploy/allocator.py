"""One arena of glibc's allocator for what lives long. With memory for each thread of its own, as glibc has it, the processes of
a run grow for thousands of updates by gaps that are never given back."""

from __future__ import annotations

import contextlib
import ctypes

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process that is started."""
_M_ARENA_MAX = -8


def one_arena() -> None:
    """Of this process, from now on: arenas that it has already stay. Nothing where another C library allocates."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
