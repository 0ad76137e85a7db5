"""What publishing and installing adapters cost of a run: their share of the wall time of training, at a config's own settings.

    python -m tests.benchmarks.publish_share [--configs random_number continuation] [--steps 40] [--repeats 5]

Of the learner: making a version. Of a sampler: installing it, its canary included. From the timelines of real runs.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tests.benchmarks.figures import Figure, report
from tests.benchmarks.runs import ROOT, job

AT_MOST = 0.05


def shares(trace: dict[str, Any]) -> dict[str, float]:
    """Share of the time between the first update's start and the last one's end, by what it is spent on."""
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    updates = [event for event in spans if event["name"] == "update" and event["cat"] == "learner"]
    start, end = min(event["ts"] for event in updates), max(event["ts"] + event["dur"] for event in updates)
    inside = [event for event in spans if start <= event["ts"] < end]
    return {
        name: sum(event["dur"] for event in inside if event["name"] == name) / (end - start) for name in ("adapter", "install")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["random_number", "continuation"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for config in arguments.configs:
        values: dict[str, list[float]] = {"adapter": [], "install": []}
        for repeat in range(arguments.repeats):
            run = job(
                str(ROOT / f"deploy/configs/{config}.yaml"), f"learner.steps={arguments.steps}", f"seed={repeat}",
                "learner.evaluation_prompts=2", "learner.evaluation_samples=2",
            )  # fmt: skip
            for name, share in shares(run.trace).items():
                values[name].append(share)
            print(f"{config}, repeat {repeat}: {values}", file=sys.stderr, flush=True)
        report(
            Figure(f"making a version, share of the learner's time, {config}", "", values["adapter"], at_most=AT_MOST),
            Figure(f"installing it, share of a sampler's time, {config}", "", values["install"], at_most=AT_MOST),
        )


if __name__ == "__main__":
    main()
