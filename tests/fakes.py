"""Samplers, a learner and a tracker without models, for tests of what is around them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from system.handles import SamplerDied, SamplerLeft
from system.trajectory import Group, Prompt, Request, Trajectory

PROMPTS = tuple(Prompt(f"prompt-{number}", (1, 2), (1, 2)) for number in range(3))


def group_for(request: Request, version: int) -> Group:
    """Random tokens that follow from the request's seed."""
    rng = np.random.default_rng(request.seed)
    trajectories, rewards = [], []
    for behaviour in request.behaviours_K:
        length = int(rng.integers(1, 5))
        tokens = rng.integers(0, 9, length).astype(np.int32)
        trajectories.append(Trajectory(tokens, np.ones(length, bool), np.zeros(length + 1, np.float32), "sampled", behaviour))
        rewards.append(-rng.random(length + 1))
    factors = {"digits": np.array([float(trajectory.tokens_T.sum()) for trajectory in trajectories])}
    return Group(request.prompt, tuple(trajectories), tuple(rewards), version, request.group_id, factors_K=factors)


class FakeSamplers:
    """Answers from `workers` threads. `fate(request)` may sleep, or raise what the request shall fail with."""

    def __init__(self, workers: int = 2, fate: Callable[[Request], None] = lambda request: None) -> None:
        self.fate = fate
        self.issued: list[int] = []
        self.named_versions: list[int] = []
        self.version = -1
        self._dead: set[str] = set()
        self._pool = ThreadPoolExecutor(workers)

    @property
    def deaths(self) -> int:
        return len(self._dead)

    def publish(self, adapter: int) -> None:
        self.version = adapter

    def sample(self, request: Request) -> Future[Group]:
        self.issued.append(request.group_id)
        self.named_versions.append(self.version)
        return self._pool.submit(self._work, request, self.version)

    def _work(self, request: Request, version: int) -> Group:
        try:
            self.fate(request)
        except SamplerDied as death:
            if not isinstance(death, SamplerLeft):
                self._dead.add(death.args[1])
            raise
        return group_for(request, version)


class FakeLearner:
    """Counts its updates; `weights` is the running sum of what it was given, so that equal runs end equal.

    `during_update` may raise LearnerDied. `batches` are those that the learner of today was given.
    """

    def __init__(self, during_update: Callable[[], None] = lambda: None) -> None:
        self.during_update = during_update
        self.restarts = 0
        self.published: list[int] = []
        self._forget()
        self._thread = ThreadPoolExecutor(1)
        self._lock = threading.Lock()

    def _forget(self) -> None:
        self.step = 0
        self.weights = np.zeros(1)
        self.batches: list[list[Group]] = []

    def restart(self) -> None:
        self.restarts += 1
        self._forget()

    def update(self, groups: Sequence[Group]) -> Future[dict[str, float]]:
        return self._thread.submit(self._update, list(groups))

    def _update(self, groups: list[Group]) -> dict[str, float]:
        self.during_update()
        with self._lock:
            self.batches.append(groups)
            self.weights = self.weights + sum(float(t.tokens_T.sum()) for g in groups for t in g.trajectories_K)
            self.step += 1
        return {"loss": 1.0 / self.step, "log_z": 0.0, "spread": 0.0, "ess": 1.0}

    def adapter(self, version: int) -> int:
        self.published.append(version)
        return version

    def save(self) -> Future[np.ndarray]:
        return self._thread.submit(lambda: np.frombuffer(self.weights.tobytes(), np.uint8))

    def restore(self, saved: np.ndarray, step: int) -> None:
        self.weights, self.step = np.frombuffer(saved.tobytes(), np.float64).copy(), step


class FakeTracker:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.tagged: dict[str, str] = {}

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, dict(values)))

    def system(self, node: str, values: dict[str, float], step: int) -> None:
        self.metrics({f"system/{node}/{name}": value for name, value in values.items()}, step)

    def tags(self, values: dict[str, str]) -> None:
        self.tagged |= values

    def series(self, name: str) -> list[float]:
        return [values[name] for _, values in self.logged if name in values]


def dies(name: str) -> Any:
    """Raises the death of sampler `name`."""
    raise SamplerDied("killed", name)
