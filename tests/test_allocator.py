"""Memory of a process that lives long."""

from __future__ import annotations

import subprocess
import sys

import pytest

ARENAS = """
import ctypes, sys, threading
from deploy.allocator import one_arena

if sys.argv[1] == "one":
    one_arena()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
c.malloc.argtypes = [ctypes.c_size_t]
together = threading.Barrier(4)
threads = [threading.Thread(target=lambda: (together.wait(), c.malloc(100), together.wait())) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.stdout.flush()
c.malloc_info(0, ctypes.c_void_p.in_dll(c, "stdout"))
c.fflush(None)
"""


@pytest.mark.parametrize(("arenas", "several"), [("one", False), ("any", True)])
def test_threads_share_one_arena_where_it_is_asked_for(arenas: str, several: bool) -> None:
    said = subprocess.run([sys.executable, "-c", ARENAS, arenas], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert said.count("<heap nr=") >= 1
    assert (said.count("<heap nr=") > 1) == several
