"""The driver's own time per group: the loop with samplers and a learner that answer at once, and MLflow tracking.

python -m tests.benchmarks.driver_rate [--repeats 5]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

from learner.replay import Replay
from system import config_file
from system.orchestrator import Orchestrator
from system.requests import Requests
from system.tracking import Tracker
from system.trajectory import Group, Request
from tests.benchmarks.figures import Figure, report
from tests.fakes import PROMPTS, FakeLearner, group_for

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


def measure() -> float:
    """Milliseconds per group."""
    settings = [f"sampler.samples_per_prompt={SAMPLES}", "learner.groups_per_update=8", f"learner.steps={GROUPS // 8}",
                "learner.checkpoint_every=1000000"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        settings += [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output_dir={folder}"]
        cfg = config_file.load("deploy/configs/random_number.yaml", settings)
        requests = Requests(PROMPTS, SAMPLES, cfg.sampler.exploration, cfg.seed)
        tracker = Tracker(Path(folder) / "run", cfg)
        loop = Orchestrator(
            cfg, requests, Instant(requests), FakeLearner(), Replay(cfg.replay), tracker, Path(folder) / "checkpoints"
        )
        started = time.perf_counter()
        loop.train()
        seconds = time.perf_counter() - started
        tracker.close("FINISHED")
    assert loop.counters.groups == GROUPS
    return seconds / GROUPS * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    values = [measure() for _ in range(parser.parse_args().repeats)]
    report(Figure(f"driver, per group of {SAMPLES}, with replay and tracking", "ms", values, at_most=1.0))


if __name__ == "__main__":
    main()
