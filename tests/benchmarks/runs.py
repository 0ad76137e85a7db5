"""Real runs of deploy/job.py, each in a folder of its own that is removed afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NO_REPLAY = ["replay={fresh: 1, prioritised: 0, uniform: 0}"]
ON_POLICY = ["sampler.exploration.on_policy=1"]
ALL_LAYERS = ["lora.layers=1"]
"""Whatever the config has: for what is compared with others, who adapt all, or counted as if all were."""


@dataclass(frozen=True)
class Run:
    summary: dict[str, Any]
    evaluations: list[dict[str, float]]
    """The metrics of each, and its `step`, in order."""
    trace: dict[str, Any]
    """timeline.json."""

    def shares(self) -> dict[str, float]:
        """What each kind of work takes of the time from the first update's start to the last one's end: of the learner's time,
        or of a sampler's, the mean where there are several."""
        spans = [event for event in self.trace["traceEvents"] if event["ph"] == "X" and event["cat"] != "loop"]
        updates = [event for event in spans if event["name"] == "update"]
        start, end = min(event["ts"] for event in updates), max(event["ts"] + event["dur"] for event in updates)
        found: dict[str, float] = {}
        for name in dict.fromkeys(event["name"] for event in spans):
            inside = [event for event in spans if event["name"] == name and start <= event["ts"] < end]
            processes = len({event["pid"] for event in inside})
            found[name] = sum(event["dur"] for event in inside) / (end - start) / max(processes, 1)
        return found


def job(*arguments: str) -> Run:
    """Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "deploy/job.py"), *arguments]
        output = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
        (run,) = (Path(folder) / "runs").iterdir()
        contents = [json.loads(path.read_text()) for path in sorted((run / "evaluations").glob("step-*.json"))]
        evaluations = [content["metrics"] | {"step": content["step"]} for content in contents]
        return Run(json.loads(output.splitlines()[-1]), evaluations, json.loads((run / "timeline.json").read_text()))
