"""Memory and load of a process and its machine."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

_MIB = 1 << 20
_METER = ThreadPoolExecutor(1, "cpu meter")
"""psutil measures CPU since the same thread asked last, and those that ask here may be of a pool."""


def system_metrics(folder: Path = Path()) -> dict[str, float]:
    """Of this process, its machine, and the disk that has `folder`. Sizes in MiB. CPU in percent of all cores since the last
    call, so 0 at first.

    GPU memory is there if this process already uses CUDA: asking must not create a CUDA context.
    """
    values = {
        "cpu_percent": _METER.submit(psutil.cpu_percent).result(),
        "process_memory_mib": psutil.Process().memory_info().rss / _MIB,
        "memory_available_mib": psutil.virtual_memory().available / _MIB,
        "disk_free_mib": psutil.disk_usage(str(folder)).free / _MIB,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        values["gpu_memory_used_mib"] = (total - free) / _MIB
        values["process_gpu_memory_mib"] = torch.cuda.memory_allocated() / _MIB
    return values
