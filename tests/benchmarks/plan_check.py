"""deploy.plan against real runs: trajectories a second as simulated over as measured, with 1 and 2 samplers.

    python -m tests.benchmarks.plan_check [random_number|continuation] [--repeats 5] [--steps 40]

Durations come from the timeline of the run with one sampler; the simulation shares this machine's cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from deploy.durations import Durations
from deploy.simulation import simulate
from system import config_file
from tests.benchmarks.figures import Figure, report
from tests.benchmarks.runs import ROOT, job


def measure(config: Path, *overrides: str) -> tuple[float, Durations]:
    """(groups a second once the pipeline is full, durations) of a real run of one group an update."""
    run = job(str(config), *overrides)
    updates = [event for event in run.trace["traceEvents"] if (event.get("cat"), event["name"]) == ("loop", "update")]
    ends = sorted(event["ts"] + event["dur"] for event in updates)
    # As the simulation does.
    ends = ends[max(1, len(ends) // 10) - 1 :]
    return (len(ends) - 1) / (ends[-1] - ends[0]) * 1e6, Durations.of_trace(run.trace, one_thread=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", choices=("random_number", "continuation"), default="random_number")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    settings = [f"learner.steps={arguments.steps}"]
    path = ROOT / f"deploy/configs/{arguments.config}.yaml"
    cfg = config_file.load(path, settings)
    ratios: dict[int, list[float]] = {1: [], 2: []}
    details: dict[int, list[str]] = {1: [], 2: []}
    for repeat in range(arguments.repeats):
        durations: Durations | None = None
        for samplers, values in ratios.items():
            real, measured = measure(path, f"actors.count={samplers}", f"seed={repeat}", *settings)
            durations = durations or measured
            simulated = simulate(cfg, durations, samplers, cores=os.cpu_count() or 1).groups_per_second
            values.append(simulated / real)
            details[samplers].append(f"{simulated:.3f} / {real:.3f}")
            print(f"repeat {repeat}, {samplers} samplers: {details[samplers][-1]} groups/s, {durations}", file=sys.stderr)
    for samplers, values in ratios.items():
        name = f"groups/s on {arguments.config} with {samplers} samplers, simulated over real"
        report(Figure(name, "x", values, 0.85, 1.15, {"simulated / real": "; ".join(details[samplers])}))


if __name__ == "__main__":
    main()
