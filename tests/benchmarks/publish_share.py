"""What publishing and installing adapters cost of a run: their share of the wall time of training, at a config's own settings.

    python -m tests.benchmarks.publish_share [--configs random_number continuation] [--steps 40] [--repeats 5]

Of the learner: making a version. Of a sampler: installing it, its canary included. From the timelines of real runs.
"""

from __future__ import annotations

import argparse
import sys

from tests.benchmarks.figures import Figure, report
from tests.benchmarks.runs import ROOT, job

AT_MOST = 0.05


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
            shares = run.shares()
            for name, found in values.items():
                found.append(shares.get(name, 0.0))
            print(f"{config}, repeat {repeat}: {values}", file=sys.stderr, flush=True)
        report(
            Figure(f"making a version, share of the learner's time, {config}", "", values["adapter"], at_most=AT_MOST),
            Figure(f"installing it, share of a sampler's time, {config}", "", values["install"], at_most=AT_MOST),
        )


if __name__ == "__main__":
    main()
