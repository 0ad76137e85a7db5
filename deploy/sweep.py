"""A config over several values: `python deploy/sweep.py CONFIG [key=value …] --over seed=0,1,2 [--over learner.lr=1e-3,3e-4]`.

One run of `deploy/job.py` for each combination, one after the other; in MLflow they are the children of one parent run. All
configs are checked before the first run starts. A run that fails is named at the end, and the others go on. Ctrl-C and
SIGTERM stop the run that is going on, with a checkpoint, and the sweep.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from deploy.job import STOPPED  # noqa: E402
from system import config_file  # noqa: E402
from system.config import ConfigError  # noqa: E402

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def combinations(over: Sequence[str]) -> Iterator[list[str]]:
    """Overrides of each run. A value with commas of its own stands in brackets or braces: `learner.betas=[0.9,0.99],[0.8,0.9]`.

    Raises:
        ConfigError: not of the form `key=value,value`.
    """
    axes = []
    for text in over:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise ConfigError(f"--over {text!r}: write a key and its values, such as --over seed=0,1,2")
        axes.append([f"{key}={value}" for value in split(values)])
    yield from map(list, itertools.product(*axes))


def split(values: str) -> list[str]:
    """At the commas that no bracket encloses."""
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def run_job(arguments: list[str]) -> int:
    """The exit status of one job. A signal is the job's to act on: killed from here, it would leave no checkpoint."""
    with subprocess.Popen([sys.executable, str(ROOT / "deploy/job.py"), *arguments]) as job:
        for number in SIGNALS:
            signal.signal(number, lambda number, _frame: job.send_signal(number))
        return job.wait()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python deploy/sweep.py", description=__doc__)
    parser.add_argument("config", help="a YAML file, such as deploy/configs/random_number.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run")
    parser.add_argument("--over", action="append", required=True, metavar="key=value,value", help="a run for each value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        runs = list(combinations(arguments.over))
        configs = [config_file.load(arguments.config, [*arguments.overrides, *run]) for run in runs]
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return 2
    sweep = configs[0].tracking.sweep or f"{configs[0].name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    failed = []
    for number, run in enumerate(runs, start=1):
        print(f"sweep {sweep}: run {number} of {len(runs)}: {' '.join(run)}", file=sys.stderr, flush=True)
        overrides = [*arguments.overrides, *run, f"tracking.sweep={sweep}"]
        code = run_job([arguments.config, *overrides])
        if code == STOPPED or -code in SIGNALS:
            return STOPPED
        if code:
            failed.append(" ".join(run))
    for run in failed:
        print(f"sweep {sweep}: failed: {run}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
