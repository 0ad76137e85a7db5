"""The loop in simulated time, by measured durations.

It has the loop's own gate, versions that enter an engine between two tokens (with sampler.drain when it has nothing to draw), a
driver that takes in one group after another, and cores that are shared evenly by all who compute.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import astuple, dataclass, field

from deploy.durations import Durations
from system.config import Config
from system.group_flow import staleness_at_use


@dataclass(frozen=True)
class SteadyState:
    """What a simulation ends in: seconds and fractions."""

    samplers: int
    groups_per_second: float
    learner_idle: float
    sampler_idle: float
    staleness: float
    driver_busy: float


@dataclass
class _SimulatedSampler:
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
        self.samplers = [_SimulatedSampler() for _ in range(samplers)]
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

    def run(self, steps: int) -> SteadyState:
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
        return SteadyState(len(self.samplers), groups, idle, 1 - engines, stale, (self.driver_busy - driver) / seconds)

    # ------------------------------------------------------------------------------------------- the loop's rules

    def _feed(self) -> None:
        per_update = self.learner.groups_per_update
        while True:
            ahead = self.in_flight + len(self.arrived) + (per_update if self.updating else 0)
            # What is being trained on counts as a step ahead.
            if staleness_at_use(self.step, ahead, per_update, self.published_step) > self.learner.max_staleness:
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

    def _admit(self, sampler: _SimulatedSampler) -> None:
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


def simulate(config: Config, durations: Durations, samplers: int, cores: float = math.inf, steps: int = 400) -> SteadyState:
    return Simulation(config, durations, samplers, cores).run(steps)
