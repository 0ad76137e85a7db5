"""A config over several values: `python deploy/sweep.py CONFIG [key=value …] --over seed=0,1,2 [--over learner.lr=1e-3,3e-4]`.

One run of `deploy/job.py` for each combination, one after the other; in MLflow they are the children of one parent run. All
configs are checked before the first run starts. A run that fails is named at the end, and the others go on. Ctrl-C, SIGTERM
and a terminal that hangs up stop the run that is going on, with a checkpoint, and the sweep.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from deploy.command import command  # noqa: E402
from deploy.job import STOPPED  # noqa: E402
from deploy.stop import SIGNALS, heard  # noqa: E402
from system import config_file  # noqa: E402
from system.config import ConfigError  # noqa: E402
from system.tracking_uri import resolve_uri  # noqa: E402


def combinations(over: Sequence[str]) -> Iterator[list[str]]:
    """Overrides of each run. Values are entries of a YAML list: one with commas of its own stands in brackets, braces or
    quotes, as in `learner.betas=[0.9,0.99],[0.8,0.9]`.

    Raises:
        ConfigError: not of the form `key=value,value`, or the values are no such entries.
    """
    axes = []
    for text in over:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise ConfigError(f"--over {text!r}: write a key and its values, such as --over seed=0,1,2")
        axes.append([f"{key}={value}" for value in split(text, values)])
    yield from map(list, itertools.product(*axes))


def split(over: str, values: str) -> list[str]:
    """The entries of a YAML list, as they are written."""
    listed = f"[{values}]"
    try:
        entries = yaml.compose(listed, yaml.SafeLoader).value
    except yaml.YAMLError as error:
        raise ConfigError(f"--over {over!r}: the values are no YAML list; put a text in quotes") from error
    return [listed[entry.start_mark.index : entry.end_mark.index] for entry in entries]


class Jobs:
    """One job after the other. A signal is the job's to act on: killed from here, it would leave no checkpoint."""

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._job: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        """Passes signals on, or has them wait for the next job, until the end of the context."""
        before = {number: signal.signal(number, self._hear) for number in heard()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _frame: object) -> None:
        self.stopped_by = number
        if self._job:
            self._job.send_signal(number)

    def run(self, arguments: list[str]) -> bool | None:
        """Whether the job ended well; None if it was stopped."""
        with subprocess.Popen([sys.executable, str(ROOT / "deploy/job.py"), *arguments]) as self._job:
            # One that came before there was a job to pass it on to.
            if self.stopped_by:
                self._job.send_signal(self.stopped_by)
            code = self._job.wait()
        stopped = self.stopped_by or code == STOPPED or -code in SIGNALS
        return None if stopped else code == 0


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python deploy/sweep.py", description=__doc__)
    parser.add_argument("config", help="a YAML file, such as deploy/configs/random_number.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run")
    parser.add_argument("--over", action="append", required=True, metavar="key=value,value", help="a run for each value")
    arguments = parser.parse_intermixed_args(argv)
    runs = list(combinations(arguments.over))
    configs = [config_file.load(arguments.config, [*arguments.overrides, *run]) for run in runs]
    for config in configs:
        resolve_uri(config.tracking.uri)
    sweep = configs[0].tracking.sweep or f"{configs[0].name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    failed, jobs = [], Jobs()
    with jobs.hearing():
        for number, run in enumerate(runs, start=1):
            print(f"sweep {sweep}: run {number} of {len(runs)}: {' '.join(run)}", file=sys.stderr, flush=True)
            ended = jobs.run([arguments.config, *arguments.overrides, *run, f"tracking.sweep={sweep}"])
            if ended is None:
                return STOPPED
            if not ended:
                failed.append(" ".join(run))
    for run in failed:
        print(f"sweep {sweep}: failed: {run}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
