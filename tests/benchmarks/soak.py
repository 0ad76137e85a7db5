"""Memory of driver, sampler and learner over a long run of deploy/job.py with a tiny model: it should stay flat.

    python -m tests.benchmarks.soak [--updates 4000] [--limit 0.5]

Real Ray, vLLM and MLflow. Resident memory of each process comes from the run's own metrics. Its slope, in MiB for 1,000
updates, is that of lines through ten windows of the last half of the updates (the timeline fills up in the first): the median,
and the third and the eighth. A step shows in one window and in the memory at last, a leak in all. Fails where the third is
above LIMIT, and where a process has too few readings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests import tiny
from tests.benchmarks.runs import ROOT

SETTINGS = {
    "name": "soak",
    "lora": {"rank": 4},
    "task": {"kind": "random_number", "high": 20},
    "sampler": {"samples_per_prompt": 8, "kv_cache_mb": 16},
    "replay": {"fresh": 0.5, "prioritised": 0.25, "uniform": 0.25},
    "learner": {"checkpoint_every": 100},
    "tracking": {"system_metrics_seconds": 1.0, "sample_table_every": 100},
}
NAME = "process_memory_mib"
WINDOWS = 10


def memory(journal: Path) -> dict[str, list[tuple[int, float]]]:
    """Process -> (update, MiB) of each reading."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in journal.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, value in entry["values"].items() if entry["kind"] == "metrics" else ():
            if name.startswith("system/") and name.endswith(NAME):
                found.setdefault(name.split("/")[1], []).append((entry["step"], value))
    return found


def slopes(points: list[tuple[int, float]]) -> list[float]:
    """MiB for 1,000 updates in each window of the readings, in order of size."""
    windows = np.array_split(np.array(points), WINDOWS)
    return sorted(float(np.polyfit(window[:, 0] / 1000, window[:, 1], 1)[0]) for window in windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--limit", type=float, default=0.5, help="MiB for 1,000 updates")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = SETTINGS | {"model": {"path": str(tiny.folder(folder))}}
        (folder / "soak.json").write_text(json.dumps(settings))
        command = [sys.executable, str(ROOT / "deploy/job.py"), "soak.json", f"learner.steps={arguments.updates}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (run,) = (folder / "runs").iterdir()
        readings = memory(run / "journal.jsonl")
    if not {"driver", "learner", "sampler-0"} <= readings.keys():
        sys.exit(f"memory was read of {sorted(readings)} alone")
    print(f"{'process':12} {'readings':>8} {'MiB half-way':>13} {'at last':>9} {'slope / 1,000':>14}  of windows")
    growing = []
    for process, points in sorted(readings.items()):
        half = [point for point in points if point[0] > arguments.updates / 2]
        if len(half) < 3 * WINDOWS:
            sys.exit(f"{process} has {len(half)} readings, fewer than {3 * WINDOWS}: give more --updates")
        found = slopes(half)
        low, high = found[2], found[-3]
        of_all = f"{half[0][1]:13.1f} {half[-1][1]:9.1f} {np.median(found):14.2f}"
        print(f"{process:12} {len(half):8} {of_all}  {low:.2f} to {high:.2f}")
        if low > arguments.limit:
            growing.append(process)
    if growing:
        sys.exit(f"memory grows by more than {arguments.limit:g} MiB for 1,000 updates: {', '.join(growing)}")


if __name__ == "__main__":
    main()
