"""The driver's own time per group, with replay and MLflow tracking: the loop alone, over samplers and a learner that answer at
once; and all threads of its process, over Ray actors that answer without a model.

    python -m tests.benchmarks.driver_rate [--repeats 5]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from deploy import ray_cluster
from deploy.pool import RaySamplers
from deploy.remote import wait_until_ready
from learner.replay import Replay
from system import config_file
from system.config import Config
from system.orchestrator import Orchestrator
from system.requests import Requests
from system.tracking import Tracker
from system.trajectory import Group, Request
from tests.benchmarks.figures import Figure, report
from tests.fakes import PROMPTS, FakeLearner, group_for
from tests.faults import Faults, FaultySampler

GROUPS, SAMPLES = 2000, 20


class Instant:
    """A pool whose groups are made beforehand."""

    deaths = 0

    def __init__(self, requests: Requests) -> None:
        self._groups = [group_for(requests.training(number), 0) for number in range(GROUPS)]
        self._version = 0

    def publish(self, adapter: int) -> None:
        self._version = adapter

    def sample(self, request: Request) -> Future[Group]:
        group = self._groups[request.group_id]
        future: Future[Group] = Future()
        future.set_result(Group(group.prompt, group.trajectories_K, group.log_reward_K, self._version, group.group_id))
        return future


class Loop:
    """On a tracking database in `folder`; `samplers` are made of its config and requests."""

    def __init__(self, folder: Path, samplers: Callable[[Config, Requests], Any]) -> None:
        settings = [f"sampler.samples_per_prompt={SAMPLES}", "learner.groups_per_update=8", f"learner.steps={GROUPS // 8}",
                    "learner.checkpoint_every=1000000", f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output_dir={folder}",
                    "actors.count=2", "actors.cpus=0.5", "learner.cpus=0.5"]  # fmt: skip
        cfg = config_file.load("deploy/configs/random_number.yaml", settings)
        requests = Requests(PROMPTS, SAMPLES, cfg.sampler.exploration, cfg.seed)
        self.tracker = Tracker(folder / "run", cfg)
        self.samplers = samplers(cfg, requests)
        self.clocks: list[tuple[float, float]] = []
        """Seconds on the wall, and of this process on all cores, after each update."""
        self.loop = Orchestrator(
            cfg, requests, self.samplers, FakeLearner(), Replay(cfg.replay), self.tracker, folder / "checkpoints", self._tick
        )

    def _tick(self, *_: Any) -> None:
        self.clocks.append((time.perf_counter(), time.process_time()))

    def milliseconds(self) -> tuple[float, float]:
        """For a group, on both clocks; the first tenth of the updates warms up."""
        self.loop.train()
        self.tracker.close("FINISHED")
        assert self.loop.counters.groups == GROUPS
        warm = len(self.clocks) // 10
        groups = (len(self.clocks) - 1 - warm) * 8
        wall, cpu = np.subtract(self.clocks[-1], self.clocks[warm]) / groups * 1000
        return float(wall), float(cpu)


def alone() -> float:
    with tempfile.TemporaryDirectory() as folder:
        return Loop(Path(folder), lambda cfg, requests: Instant(requests)).milliseconds()[0]


def over_ray() -> float:
    def pool(cfg: Config, requests: Requests) -> RaySamplers:
        ray_cluster.connect(cfg)
        return RaySamplers(cfg, Faults(), actor=FaultySampler)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as folder:
        loop = None
        try:
            loop = Loop(Path(folder), pool)
            wait_until_ready(loop.samplers)
            return loop.milliseconds()[1]
        finally:
            if loop is not None:
                loop.samplers.close()
            ray_cluster.disconnect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = range(parser.parse_args().repeats)
    report(
        Figure(f"driver, per group of {SAMPLES}, the loop alone", "ms", [alone() for _ in repeats], at_most=1.0),
        Figure(f"driver, per group of {SAMPLES}, CPU of all its threads over Ray", "ms", [over_ray() for _ in repeats]),
    )


if __name__ == "__main__":
    main()
