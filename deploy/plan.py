"""How many samplers a learner can use, and how stale groups get: the loop simulated from measured durations.

    python -m deploy.plan CONFIG --run RUN [--samplers 1,2,4,8] [--cores 2] [key=value …]
    python -m deploy.plan CONFIG --update 1.0 --group 0.5 --install 0.3 [--reward 0.1] [--adapter 0.1]

Durations come from the timeline of a run (seconds of work, its waiting for a core left out where an actor computes with one
thread) or from the command line. Without --cores everyone has cores of their own, as on a cluster.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

from deploy.command import command
from deploy.durations import DRIVER_SECONDS, DRIVER_UPDATE_SECONDS, Durations
from deploy.runs import find_run
from deploy.simulation import SteadyState, simulate
from system import config_file
from system.config import ConfigError

SECONDS = ("update", "group", "install", "reward", "adapter")


def table(plans: Sequence[SteadyState], samples: int) -> str:
    head = f"{'samplers':>8} {'traj/s':>9} {'learner idle':>13} {'samplers idle':>14} {'staleness':>10} {'driver busy':>12}"
    rows = [
        f"{p.samplers:8d} {p.groups_per_second * samples:9.1f} {p.learner_idle:13.0%} {p.sampler_idle:14.0%} "
        f"{p.staleness:10.2f} {p.driver_busy:12.1%}"
        for p in plans
    ]
    return "\n".join([head, *rows])


def advice(plans: Sequence[SteadyState], driver_seconds: float) -> str:
    """The fewest samplers that come within 5 % of the best rate."""
    best = max(plan.groups_per_second for plan in plans)
    enough = next(plan for plan in plans if plan.groups_per_second >= 0.95 * best)
    saturated = 1 / driver_seconds
    number = "1 sampler is" if enough.samplers == 1 else f"{enough.samplers} samplers are"
    return (
        f"{number} enough for this learner; more bring less than 5 %. "
        f"The driver saturates at {saturated:.0f} groups/s, {saturated / best:.0f} times the best rate here."
    )


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run", help="folder of a run with a timeline.json, or its name under runs/")
    for name in SECONDS:
        parser.add_argument(f"--{name}", type=float, help="seconds of work, in place of the run's")
    default = f"{DRIVER_SECONDS:g} + {DRIVER_UPDATE_SECONDS:g} / learner.groups_per_update"
    parser.add_argument("--driver", type=float, help=f"seconds for a group ({default})")
    parser.add_argument("--samplers", default="1,2,4,8,16,32", help="numbers to try")
    parser.add_argument("--cores", type=float, default=math.inf, help="cores that all actors share")
    arguments = parser.parse_intermixed_args(argv)
    config = config_file.load(arguments.config, arguments.overrides)
    counts = _counts(arguments.samplers)
    if not arguments.cores > 0:
        raise ConfigError(f"--cores={arguments.cores}: must be above 0; leave it out where everyone has cores of their own")
    driver = arguments.driver
    if driver is None:
        driver = DRIVER_SECONDS + DRIVER_UPDATE_SECONDS / config.learner.groups_per_update
    if not 0 < driver < math.inf:
        raise ConfigError(f"--driver={driver}: must be above 0, in seconds")
    durations = replace(_durations(arguments, config.sampler.samples_per_prompt), driver=driver)
    print(f"seconds of work: {durations}")
    plans = [simulate(config, durations, count, arguments.cores) for count in counts]
    print(table(plans, config.sampler.samples_per_prompt))
    print(advice(plans, durations.driver))
    return 0


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--samplers={text}: needs whole numbers of 1 or more, as in --samplers 1,2,4")
    return [int(part) for part in parts]


def _durations(arguments: argparse.Namespace, samples: int) -> Durations:
    """Those that are given, and the rest from a run."""
    given = {name: seconds for name in SECONDS if (seconds := getattr(arguments, name)) is not None}
    for name, seconds in given.items():
        if not 0 <= seconds < math.inf or (name in ("update", "group") and not seconds):
            bound = "above 0" if name in ("update", "group") else "0 or more"
            raise ConfigError(f"--{name}={seconds}: must be {bound}, in seconds")
    if arguments.run:
        run_dir = find_run(arguments.run)
        durations = Durations.of_run(run_dir)
        if (of_run := config_file.load(run_dir / "config.yaml", []).sampler.samples_per_prompt) != samples:
            print(f"the run has groups of {of_run}, the config of {samples}, whose work is another", file=sys.stderr)
        return replace(durations, **given)
    if missing := [f"--{name}" for name in ("update", "group", "install") if name not in given]:
        raise ConfigError(f"durations are needed: --run RUN, or {', '.join(missing)} in seconds")
    return Durations(**{"reward": 0.0, "adapter": 0.0} | given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
