"""Memory of driver, sampler and learner over a long run of deploy/job.py with a tiny model: it should stay flat.

    python -m tests.benchmarks.soak [--updates 4000] [--limit 2]

Real Ray, vLLM and MLflow. Resident memory of each process comes from the run's own metrics; the slope is that of a line
through the last half of the updates (the timeline fills up in the first), in MiB for 1,000 updates, with the spread of points
around it. Fails where a process grows by more than LIMIT, its spread taken off, and where one has no readings.
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


def memory(journal: Path) -> dict[str, list[tuple[int, float]]]:
    """Process -> (update, MiB) of each reading."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in journal.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, value in entry["values"].items() if entry["kind"] == "metrics" else ():
            if name.startswith("system/") and name.endswith(NAME):
                found.setdefault(name.split("/")[1], []).append((entry["step"], value))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--limit", type=float, default=2.0, help="MiB for 1,000 updates")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = SETTINGS | {"model": {"path": str(tiny.folder(folder))}}
        (folder / "soak.json").write_text(json.dumps(settings))
        command = [sys.executable, str(ROOT / "deploy/job.py"), "soak.json", f"learner.steps={arguments.updates}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (run,) = (folder / "runs").iterdir()
        readings = memory(run / "journal.jsonl")
    print(f"{'process':12} {'readings':>8} {'MiB at first':>13} {'at last':>9} {'slope / 1,000':>14} {'± 2 sigma':>10}")
    if not {"driver", "learner", "sampler-0"} <= readings.keys():
        sys.exit(f"memory was read of {sorted(readings)} alone")
    growing = []
    for process, points in sorted(readings.items()):
        step, mib = np.array([point for point in points if point[0] > arguments.updates / 2]).T
        (slope, _), covariance = np.polyfit(step / 1000, mib, 1, cov=True)
        spread = 2 * float(np.sqrt(covariance[0, 0]))
        print(f"{process:12} {len(step):8} {mib[0]:13.1f} {mib[-1]:9.1f} {slope:14.2f} {spread:10.2f}")
        if slope - spread > arguments.limit:
            growing.append(process)
    if growing:
        sys.exit(f"memory grows by more than {arguments.limit:g} MiB for 1,000 updates: {', '.join(growing)}")


if __name__ == "__main__":
    main()
