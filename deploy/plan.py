"""How many samplers a learner can use, and how stale groups get: the loop simulated from measured durations.

    python -m deploy.plan CONFIG --run RUN [--samplers 1,2,4,8] [--cores 2] [key=value …]
    python -m deploy.plan CONFIG --update 1.0 --group 0.5 --install 0.3 [--reward 0.1] [--adapter 0.1]

Durations come from the timeline of a run (seconds of work, its waiting for a core left out where an actor computes with one
thread) or from the command line. The simulation has the loop's own gate, versions that enter an engine between two tokens (with
sampler.drain when it has nothing to draw), a driver that takes in one group after another, and cores that are shared evenly by
all who compute; without --cores everyone has cores of their own, as on a cluster.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from deploy.command import command  # noqa: E402
from deploy.runs import find_run  # noqa: E402
from system import config_file  # noqa: E402
from system.config import Config, ConfigError  # noqa: E402

SECONDS = ("update", "group", "install", "reward", "adapter")
DRIVER_SECONDS, DRIVER_UPDATE_SECONDS = 0.004, 0.006
"""For a group of 20, and for an update once more, of which MLflow is told: as tests/benchmarks/driver_rate.py measures it over
Ray, with one group an update and with eight."""


@dataclass(frozen=True)
class Durations:
    """Seconds of work."""

    update: float
    adapter: float
    """Of the learner, for a version."""
    install: float
    group: float
    """Of an engine, for a group."""
    reward: float
    driver: float = DRIVER_SECONDS + DRIVER_UPDATE_SECONDS
    """Of the loop itself, for a group, its share of an update's included."""

    @classmethod
    def of_trace(cls, trace: dict[str, Any], one_thread: bool) -> Durations:
        """From a run's timeline; medians, and for the engines means, since groups share them. Groups of evaluations, which have
        another size, are left out.

        Raises:
            ConfigError: the run was too short to have all kinds of work.
        """
        spans: dict[str, list[float]] = {}
        skipped: set[tuple[int, str]] = set()
        work = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        evaluations = [(event["ts"], event["ts"] + event["dur"]) for event in work if event["name"] == "evaluate"]
        for event in work:
            if event["cat"] == "loop":
                continue
            # An engine draws for no group alone, so that only the time tells whom it draws for.
            if event["name"] == "generate" and any(start <= event["ts"] < end for start, end in evaluations):
                continue
            if event["name"] == "reward" and event["args"]["group"] < 0:
                continue
            # The first of each kind warms up.
            if (event["pid"], event["name"]) not in skipped:
                skipped.add((event["pid"], event["name"]))
                if event["name"] not in ("generate", "reward"):
                    continue
            seconds = event["tdur"] if one_thread else event["dur"]
            spans.setdefault(event["name"], []).append(seconds / 1e6)
        missing = {"update", "adapter", "install", "generate", "reward"} - spans.keys()
        if missing:
            raise ConfigError(f"the run's timeline has too few spans of {', '.join(sorted(missing))}; take a longer run")
        return cls(
            update=statistics.median(spans["update"]),
            adapter=statistics.median(spans["adapter"]),
            install=statistics.median(spans["install"]),
            group=sum(spans["generate"]) / len(spans["reward"]),
            reward=statistics.median(spans["reward"]),
        )


@dataclass(frozen=True)
class Plan:
    """What a simulation gives; a steady state, seconds and fractions."""

    samplers: int
    groups_per_second: float
    learner_idle: float
    sampler_idle: float
    staleness: float
    driver_busy: float


@dataclass
class _Sampler:
    version: int = -1
    queue: deque[tuple[int, int]] = field(default_factory=deque)
    """(group, version it asks for)"""
    running: dict[int, float] = field(default_factory=dict)
    """Group -> work left."""
    installing: float = 0.0
    target: int = -1
    rewards: deque[tuple[int, float]] = field(default_factory=deque)
    """(group, work left): one thread, in order."""
    busy: float = 0.0

    @property
    def load(self) -> int:
        return len(self.queue) + len(self.running) + len(self.rewards)


class Simulation:
    """The loop of system.orchestrator, with the gate of system.group_flow, in simulated time."""

    def __init__(self, config: Config, durations: Durations, samplers: int, cores: float) -> None:
        self.learner, self.drain, self.cores = config.learner, config.sampler.drain, cores
        # 0 stands for no work at hand.
        self.durations = Durations(*(max(seconds, 1e-6) for seconds in astuple(durations)))
        self.samplers = [_Sampler() for _ in range(samplers)]
        self.step = self.published_step = self.next_group = 0
        self.version = -1
        self.version_step: dict[int, int] = {}
        self.group_version: dict[int, int] = {}
        self.in_flight = 0
        self.driver: deque[tuple[int, float]] = deque()
        """(group, work left): one thread, in order."""
        self.arrived: deque[int] = deque()
        self.updating = self.publishing = 0.0
        self.now = self.learner_busy = self.driver_busy = 0.0
        self.staleness: list[int] = []

    def run(self, steps: int) -> Plan:
        """Simulates `steps` updates; the first tenth only fills the pipeline."""
        self._publish_done()
        warm = max(1, steps // 10)
        started = busy = driver = sampler_busy = 0.0
        while self.step < steps:
            before = self.step
            self._feed()
            self._advance()
            if before < warm <= self.step:
                started, busy, driver = self.now, self.learner_busy, self.driver_busy
                sampler_busy = sum(sampler.busy for sampler in self.samplers)
        seconds = self.now - started
        groups = (steps - warm) * self.learner.groups_per_update / seconds
        engines = (sum(sampler.busy for sampler in self.samplers) - sampler_busy) / seconds / len(self.samplers)
        idle = 1 - (self.learner_busy - busy) / seconds
        stale = statistics.mean(self.staleness[warm * self.learner.groups_per_update :])
        return Plan(len(self.samplers), groups, idle, 1 - engines, stale, (self.driver_busy - driver) / seconds)

    # ------------------------------------------------------------------------------------------- the loop's rules

    def _feed(self) -> None:
        per_update = self.learner.groups_per_update
        while True:
            ahead = self.in_flight + len(self.arrived) + (per_update if self.updating else 0)
            # What is being trained on counts as a step ahead.
            used_at = self.step + ahead // per_update
            if used_at - self.published_step > self.learner.max_staleness:
                break
            group, self.next_group = self.next_group, self.next_group + 1
            sampler = min(self.samplers, key=lambda sampler: sampler.load)
            sampler.queue.append((group, self.version))
            self.in_flight += 1
        if not self.updating and not self.publishing and len(self.arrived) >= per_update:
            taken = [self.arrived.popleft() for _ in range(per_update)]
            self.staleness += [self.step - self.version_step[self.group_version[group]] for group in taken]
            self.updating = self.durations.update
        for sampler in self.samplers:
            self._admit(sampler)

    def _admit(self, sampler: _Sampler) -> None:
        while sampler.queue and not sampler.installing:
            group, wanted = sampler.queue[0]
            if wanted > sampler.version:
                if not (self.drain and sampler.running):
                    sampler.installing, sampler.target = self.durations.install, wanted
                return
            sampler.queue.popleft()
            sampler.running[group] = self.durations.group
            self.group_version[group] = sampler.version

    def _publish_done(self) -> None:
        self.version += 1
        self.published_step = self.step
        self.version_step[self.version] = self.step

    # ---------------------------------------------------------------------------------------------- simulated time

    def _advance(self) -> None:
        """To the next event: the work that ends first, at the pace that the cores allow."""
        engines = [sampler for sampler in self.samplers if sampler.installing or sampler.running]
        queues = [queue for queue in (self.driver, *(sampler.rewards for sampler in self.samplers)) if queue]
        learning = bool(self.updating or self.publishing)
        computing = len(engines) + len(queues) + (self.learner.ranks if self.updating else learning)
        pace = min(1.0, self.cores / computing)
        ends = [queue[0][1] for queue in queues]
        ends += [s.installing or min(s.running.values()) * len(s.running) for s in engines]
        ends += [self.updating or self.publishing] if learning else []
        work = min(ends)
        self.now += work / pace
        self.driver_busy += work / pace if self.driver else 0.0
        for queue in queues:
            group, left = queue[0]
            queue[0] = (group, left - work)
        for sampler in engines:
            sampler.busy += work / pace
            if sampler.installing:
                sampler.installing = _rest(sampler.installing, work)
                sampler.version = sampler.target if not sampler.installing else sampler.version
                continue
            share = work / len(sampler.running)
            for group in list(sampler.running):
                sampler.running[group] = _rest(sampler.running[group], share)
                if not sampler.running[group]:
                    del sampler.running[group]
                    sampler.rewards.append((group, self.durations.reward))
        while self.driver and not _rest(self.driver[0][1], 0.0):
            self.arrived.append(self.driver.popleft()[0])
            self.in_flight -= 1
        for sampler in self.samplers:
            while sampler.rewards and not _rest(sampler.rewards[0][1], 0.0):
                self.driver.append((sampler.rewards.popleft()[0], self.durations.driver))
        if learning:
            self.learner_busy += work / pace
            self._learn(work)

    def _learn(self, work: float) -> None:
        if self.updating:
            self.updating = _rest(self.updating, work)
            if not self.updating:
                self.step += 1
                if self.step % self.learner.publish_every == 0:
                    self.publishing = self.durations.adapter
        else:
            self.publishing = _rest(self.publishing, work)
            if not self.publishing:
                self._publish_done()


def _rest(left: float, work: float) -> float:
    """What is left of a piece of work, 0 within rounding."""
    return 0.0 if left - work < 1e-9 else left - work


def simulate(config: Config, durations: Durations, samplers: int, cores: float = math.inf, steps: int = 400) -> Plan:
    return Simulation(config, durations, samplers, cores).run(steps)


def table(plans: Sequence[Plan], samples: int) -> str:
    head = f"{'samplers':>8} {'traj/s':>9} {'learner idle':>13} {'samplers idle':>14} {'staleness':>10} {'driver busy':>12}"
    rows = [
        f"{p.samplers:8d} {p.groups_per_second * samples:9.1f} {p.learner_idle:13.0%} {p.sampler_idle:14.0%} "
        f"{p.staleness:10.2f} {p.driver_busy:12.1%}"
        for p in plans
    ]
    return "\n".join([head, *rows])


def advice(plans: Sequence[Plan], driver_seconds: float) -> str:
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
        return replace(_of_run(arguments.run, samples), **given)
    if missing := [f"--{name}" for name in ("update", "group", "install") if name not in given]:
        raise ConfigError(f"durations are needed: --run RUN, or {', '.join(missing)} in seconds")
    return Durations(**{"reward": 0.0, "adapter": 0.0} | given)


def _of_run(run: str, samples: int) -> Durations:
    run_dir = find_run(run)
    path = run_dir / "timeline.json"
    if not path.is_file():
        raise ConfigError(f"--run {run!r}: there is no {path}; a run writes it when it ends")
    measured = config_file.load(run_dir / "config.yaml", [])
    if (of_run := measured.sampler.samples_per_prompt) != samples:
        print(f"the run has groups of {of_run}, the config of {samples}, whose work is another", file=sys.stderr)
    one_thread = measured.actors.threads == measured.learner.thread_count == 1
    one_thread = one_thread and not (measured.actors.gpus or measured.learner.gpus)
    return Durations.of_trace(json.loads(path.read_text(encoding="utf-8")), one_thread)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
