"""Losses and exploration settings by their time to the posterior, several seeds each.

    python -m tests.benchmarks.ablation [--seeds 0,1,2] [--steps 60] [--only loss]

`random_number`: seconds of training until the exact KL is at most 0.05 (infinite where it is not reached), and the KL and
the least due of a number at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from tests.benchmarks.figures import Figure, report
from tests.benchmarks.original_recipe import TARGET
from tests.benchmarks.runs import job

NO_REPLAY = ["replay.fresh=1", "replay.prioritised=0", "replay.uniform=0"]
ON_POLICY = ["sampler.exploration.on_policy=1"]
SETTINGS: dict[str, list[str]] = {
    "loss pooled (default)": [],
    "loss vargrad": ["loss.kind=vargrad"],
    "loss subtb": ["loss.kind=subtb"],
    "loss tb": ["loss.kind=tb"],
    "loss db": ["loss.kind=db"],
    "exploration none": ON_POLICY,
    "exploration by temperature alone": ["sampler.exploration.epsilon=0"],
    "exploration none, no replay": ON_POLICY + NO_REPLAY,
    "no replay": NO_REPLAY,
    "staleness 0": ["learner.max_staleness=0", "learner.publish_every=1"],
    "staleness 4": ["learner.max_staleness=4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="", help="settings whose name starts so")
    arguments = parser.parse_args()
    path = str(Path("deploy/configs/random_number.yaml").resolve())
    for name, overrides in SETTINGS.items():
        if not name.startswith(arguments.only):
            continue
        times, final, worst, rates = [], [], [], []
        for seed in arguments.seeds.split(","):
            steps = [f"seed={seed}", "learner.evaluate_every=5", f"learner.steps={arguments.steps}"]
            run = job(path, *steps, *overrides)
            reached = [m["seconds_training"] for m in run.evaluations if m["exact/kl_target_q"] <= TARGET]
            # Not reached: longer than the run was.
            times.append(min(reached, default=run.summary["seconds_training"]))
            final.append(run.summary["after"]["exact/kl_target_q"])
            worst.append(run.summary["after"]["exact/worst_ratio"])
            rates.append(run.summary["trajectories_per_second"])
            print(f"{name}, seed {seed}: {times[-1]:.1f} s, KL {final[-1]:.4f}, worst {worst[-1]:.2f}", file=sys.stderr)
        detail = {
            "kl_after": json.dumps([round(value, 5) for value in final]),
            "worst_ratio_after": json.dumps([round(value, 3) for value in worst]),
            "trajectories_per_second": round(statistics.median(rates), 2),
        }
        report(Figure(f"time to exact KL {TARGET} on random_number, {name}", "s", times, detail=detail))


if __name__ == "__main__":
    main()
