"""Whom the loop talks to: samplers and a learner that answer with futures, wherever they run, a buffer, and a tracker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from system.run_error import RunError
from system.scores import Scores
from system.trajectory import Group, Prompt, Request, Trajectory

T = TypeVar("T")

ATTEMPTS = 3
"""How often something is asked of samplers before one that is lost over it counts as a failure."""


class SamplerDied(RunError):
    """SamplerDied(cause, name): the sampler that worked on a request is gone, and the pool is replacing it.

    The name is unique to that sampler, so that a death which costs several requests counts once.
    """

    def __str__(self) -> str:
        cause, name = self.args
        return f"{name} is gone: {cause}"


class SamplerLeft(SamplerDied):
    """SamplerLeft(cause, name): the pool itself ended the sampler, so that it counts for no death."""


class LearnerDied(RunError):
    """The learner's process is gone, with the updates since the last checkpoint. Handles raise it from any call."""


def asked(ask: Callable[[], Future[T]]) -> Callable[[], T]:
    """Asks at once. The function returned waits for the answer, and asks anew where a sampler was lost over it: its
    successor answers. Raises SamplerDied after ATTEMPTS."""
    first = ask()

    def answer() -> T:
        future = first
        for _ in range(ATTEMPTS - 1):
            try:
                return future.result()
            except SamplerDied:
                future = ask()
        return future.result()

    return answer


class Samplers(Protocol):
    """Who draws, from the adapter published last."""

    def publish(self, adapter: Any) -> None: ...
    def sample(self, request: Request) -> Future[Group]:
        """Fails with SamplerDied if the sampler is lost, with the sampler's own error if it refuses, and with RunError if
        there is none left to ask."""
        ...


class Pool(Samplers, Protocol):
    """Samplers that may die."""

    @property
    def deaths(self) -> int:
        """Samplers that died since the pool began, with work or without."""
        ...


class Rewards(Protocol):
    """Who scores samples that are there already."""

    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
        """log R at every prefix."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class GroupLogQ:
    """What a policy says of one group, without gradients."""

    log_q_K: np.ndarray
    """float64 [K]: log q of each whole trajectory, its stop included, nats."""
    log_q_stop_K: np.ndarray
    """float64 [K]: log q(stop) where it ended, nats; 0 where the stop was forced."""


class Scorer(Protocol):
    """Who knows the policy."""

    def score(self, groups: Sequence[Group]) -> Future[list[GroupLogQ]]:
        """log q of the groups under the current policy, in their order."""
        ...


class LearnerHandle(Protocol):
    """The learner, one call at a time, in the order of the calls. An adapter may be a reference to one elsewhere."""

    def update(self, groups: Sequence[Group]) -> Future[dict[str, float]]: ...
    def adapter(self, version: int) -> Any: ...
    def save(self) -> Future[np.ndarray]: ...
    def restore(self, saved: np.ndarray, step: int) -> None: ...
    def restart(self) -> None:
        """A new learner with the weights that the run began with, in place of the one that died."""
        ...


class Buffer(Protocol):
    def __len__(self) -> int: ...
    def add(self, group: Group) -> None: ...
    def mix(self, fresh: Group, rng: np.random.Generator) -> Group: ...
    def save(self) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]: ...
    def restore(self, arrays: dict[str, np.ndarray], records: list[dict[str, Any]]) -> None: ...


class Tracker(Protocol):
    def metrics(self, values: dict[str, float], step: int) -> None: ...
