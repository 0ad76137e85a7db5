"""The driver's own time per group, with replay and tracking, for updates of one and of eight groups: the loop alone, over
samplers and a learner that answer at once; what telling MLflow of an update takes beside it, in a thread of the same process;
and both over Ray actors that answer without a model, on the wall and of all threads.

    python -m tests.benchmarks.driver_rate [--repeats 5]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import Future
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from deploy import ray_cluster
from deploy.pool import RaySamplers
from deploy.readiness import wait_until_ready
from learner.replay import Replay
from system import config_file
from system.config import Config
from system.orchestrator import Orchestrator
from system.requests import Requests
from system.tracking import Tracker
from system.trajectory import Group, Request
from tests.benchmarks.figures import Figure, report
from tests.fakes import FakeLearner, group_for
from tests.faults import Faults, FaultySampler
from tests.loops import requests_of

GROUPS, SAMPLES = 2000, 20
TOGETHER = (1, 8)
"""Groups of an update."""


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


def config(folder: str, together: int, *overrides: str) -> Config:
    settings = [f"sampler.samples_per_prompt={SAMPLES}", f"learner.groups_per_update={together}",
                f"learner.steps={GROUPS // together}", "learner.checkpoint_every=1000000", "actors.count=2", "actors.cpus=0.5",
                "learner.cpus=0.5", f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output_dir={folder}"]  # fmt: skip
    return config_file.load("deploy/configs/random_number.yaml", [*settings, *overrides])


def milliseconds(cfg: Config, samplers: Any) -> tuple[float, float, float]:
    """For a group, on the wall and of this process on all cores, the first tenth of the updates being left out; and for an
    update, what MLflow takes of what was not sent before the end."""
    folder, clocks = Path(cfg.output_dir), []
    tracker = Tracker(folder / "run", cfg)
    # MLflow is imported and its database made: seconds of a start, not of a group.
    while tracker.lag():
        time.sleep(0.1)
    loop = Orchestrator(
        cfg, requests_of(cfg), samplers, FakeLearner(), Replay(cfg.replay), tracker, folder / "checkpoints",
        lambda *_: clocks.append((time.perf_counter(), time.process_time())),
    )  # fmt: skip
    loop.train()
    ended = time.perf_counter()
    tracker.close("FINISHED")
    told = (time.perf_counter() - ended) / len(clocks) * 1000
    assert loop.counters.groups == GROUPS
    warm = len(clocks) // 10
    wall, cpu = np.subtract(clocks[-1], clocks[warm]) / ((len(clocks) - 1 - warm) * cfg.learner.groups_per_update) * 1000
    return float(wall), float(cpu), told


def alone(together: int) -> tuple[float, float]:
    """(of the loop for a group, of MLflow for an update, which is told all of them afterwards)"""
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(folder, together, "tracking.flush_seconds=3600")
        wall, _, told = milliseconds(cfg, Instant(requests_of(cfg)))
        return wall, told


def over_ray(together: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cfg = config(folder, together, "tracking.flush_seconds=0.5")
        stack.callback(ray_cluster.disconnect)
        ray_cluster.connect(cfg)
        samplers = stack.enter_context(closing(RaySamplers(cfg, Faults(), actor=FaultySampler)))  # type: ignore[arg-type]
        wait_until_ready(samplers)
        return milliseconds(cfg, samplers)[:2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = range(parser.parse_args().repeats)
    for together in TOGETHER:
        what = f"driver, per group of {SAMPLES}, {together} an update"
        loop, told = zip(*(alone(together) for _ in repeats), strict=True)
        report(Figure(f"{what}, the loop alone", "ms", loop, at_most=1.0), Figure(f"{what}: MLflow, an update", "ms", told))
        wall, cpu = zip(*(over_ray(together) for _ in repeats), strict=True)
        report(
            Figure(f"{what}, over Ray", "ms", wall, at_most=1.0),
            Figure(f"{what}, over Ray, CPU of all its threads", "ms", cpu),
        )


if __name__ == "__main__":
    main()
