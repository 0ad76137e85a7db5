"""A config over several seeds, each a run of its own: the figures of every run, with median and spread.

    python -m tests.benchmarks.seeds CONFIG [--seeds 0,1,2] [key=value …]

Prints one line of JSON: for each figure of the summaries the values by seed, their median, minimum and maximum. Memory is
the largest sum over all processes of the run (unique set size, so that pages shared between processes count once), GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
from typing import Any

import psutil


def run(config: str, overrides: list[str]) -> dict[str, Any]:
    """The summary of one job. Raises CalledProcessError if it fails."""
    command = [sys.executable, "deploy/job.py", config, *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak, done = [0.0], threading.Event()
        watcher = threading.Thread(target=_watch_memory, args=(process.pid, peak, done))
        watcher.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line)
        code = process.wait()
        done.set()
        watcher.join()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return json.loads(lines[-1]) | {"peak_memory_gib": round(peak[0] / 2**30, 2)}


def _watch_memory(pid: int, peak: list[float], done: threading.Event) -> None:
    while not done.wait(1.0):
        total = 0
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            try:
                total += process.memory_full_info().uss
            # Processes come and go between listing and reading them.
            except psutil.Error:
                continue
        peak[0] = max(peak[0], total)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested summary under dotted names."""
    result: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            result[f"{prefix}{key}"] = float(value)
    return result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_intermixed_args(argv)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    summaries = [flat(run(arguments.config, [*arguments.overrides, f"seed={seed}"])) for seed in seeds]
    figures = {
        name: {"by_seed": values, "median": statistics.median(values), "min": min(values), "max": max(values)}
        for name in summaries[0]
        if (values := [summary[name] for summary in summaries if name in summary])
    }
    print(json.dumps({"config": arguments.config, "overrides": arguments.overrides, "seeds": seeds, "figures": figures}))


if __name__ == "__main__":
    main(sys.argv[1:])
