"""Memory that Ray itself needs for each call, driver and actor doing nothing else: what a long run cannot stay below.

    python -m tests.benchmarks.ray_memory [--calls 20000]

The slope of a line through the last half of the calls, bytes for a call, of memory that no other process shares.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import psutil
import ray

from tests.benchmarks.figures import Figure, report

READINGS = 40
PAYLOAD_BYTES = 2000
"""Small enough to go with the call itself, as most of a run's do."""


class Echo:
    def answer(self, payload: np.ndarray) -> np.ndarray:
        return payload

    def memory(self) -> int:
        return _memory()


def _memory() -> int:
    return psutil.Process().memory_full_info().uss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    calls = parser.parse_args().calls
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    remote: Any = ray.remote(Echo)
    echo = remote.remote()
    payload, readings = np.zeros(PAYLOAD_BYTES, np.uint8), []
    for number in range(calls):
        ray.get(echo.answer.remote(payload))
        if number >= calls / 2 and number % (calls // (2 * READINGS)) == 0:
            readings.append((number, _memory(), ray.get(echo.memory.remote())))
    number, driver, actor = np.array(readings).T
    for name, used in (("driver", driver), ("actor", actor)):
        slope, _ = np.polyfit(number, used, 1)
        report(Figure(f"memory of an idle Ray {name} for a call", "bytes", [float(slope)], detail={"calls": calls}))


if __name__ == "__main__":
    main()
