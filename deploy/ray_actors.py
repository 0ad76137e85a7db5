"""What runs in Ray's actors: a sampler, or a rank of the learner. Plain classes, each built inside its own process.

`deploy.ray_learner` and `deploy.pool` start them and speak to them.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from system.adapters import Adapter
from system.config import Config
from system.handles import GroupLogQ
from system.scores import Scores
from system.timeline import Span
from system.trajectory import Group, Prompt, Request, Trajectory

if TYPE_CHECKING:
    from system.tasks.problem import Outline

GOODBYE_SECONDS = 2.0


class BuiltActor:
    """Constructs its part, and says by its next call what went wrong.

    An error in an actor's constructor reaches the caller as the actor's death, without its type and its message.
    """

    _built: Any
    _error: Exception | None = None

    def construct(self, build: Callable[..., Any], *arguments: Any) -> None:
        self._error = None
        try:
            self._built = build(*arguments)
        # A border: every error is kept for the next call, which raises it.
        except Exception as error:
            self._error = error

    @property
    def part(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._built

    def ready(self) -> int:
        """The process id, once this actor is built."""
        assert self.part is not None
        return os.getpid()

    def until_death(self) -> None:
        """Never returns: its reference fails when this process is gone, also if nothing else is asked of it."""
        threading.Event().wait()

    def stats(self) -> dict[str, float]:
        """Memory and load of this process and its node."""
        from system.process_metrics import system_metrics

        return system_metrics()

    def node(self) -> str:
        """Where this process is: host, address, and Ray's id of the node."""
        node_id = ray.get_runtime_context().get_node_id()
        return f"{socket.gethostname()} {ray.util.get_node_ip_address()} {node_id}"

    def spans(self) -> list[Span]:
        """What this process did since the last time."""
        return self.part.timeline.drain()


class SamplerActor(BuiltActor):
    """A Sampler in this process. If its engine dies, so does the process: a dead engine must not look alive."""

    def __init__(self, config: Config, problem: Outline) -> None:
        self.construct(_build_sampler, config, problem)

    def sample(self, request: Request, adapter: Adapter) -> Group:
        return self.part.sample(request, adapter)

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        return self.part.score(prompt, trajectories_K)

    def progress(self) -> int:
        return self.part.progress

    def stats(self) -> dict[str, float]:
        return self.part.stats() | super().stats()


class LearnerActor(BuiltActor):
    """A Learner in this process, one of `size` ranks: built once it knows where the ranks meet."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._store: Any = None

    def open_meeting(self) -> tuple[str, int]:
        """Of rank 0: the address at which the others find it."""
        from learner.ranks import open_store

        self._store = open_store(ray.util.get_node_ip_address(), self._size)
        return self._store.host, self._store.port

    def build(self, config: Config, problem: Outline, meeting: tuple[str, int] | None) -> None:
        self.construct(_build_learner, config, problem, self._rank, self._store, meeting)

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        with self.part.timeline.span("update", "learner", step=self.part.step):
            return self.part.update(groups)

    def adapter(self, version: int) -> Adapter:
        with self.part.timeline.span("adapter", "learner", version=version):
            return self.part.adapter(version)

    def score(self, groups: Sequence[Group]) -> list[GroupLogQ]:
        with self.part.timeline.span("score", "learner"):
            return self.part.score(groups)

    def save(self) -> np.ndarray:
        with self.part.timeline.span("save", "learner", step=self.part.step):
            return self.part.save()

    def restore(self, saved: np.ndarray, step: int) -> None:
        self.part.restore(saved, step)


def _build_sampler(config: Config, problem: Outline) -> Any:
    from actors.build import build_sampler

    return build_sampler(config, problem, on_death=_exit_soon)


def _build_learner(config: Config, problem: Outline, rank: int, store: Any, meeting: tuple[str, int] | None) -> Any:
    from learner.learner import Learner
    from learner.ranks import Ranks, reach_store
    from system.pretrained import resolve_device

    if meeting is None:
        return Learner.build(config, problem)
    learner = config.learner
    store = store or reach_store(*meeting, learner.ranks)
    device = resolve_device(learner.device)
    ranks = Ranks.join(rank, learner.ranks, store, device, in_lockstep=learner.shard_base)
    return Learner.build(config, problem, ranks)


def _exit_soon() -> None:
    """Ends this process once the callers have had time to be told why."""
    threading.Timer(GOODBYE_SECONDS, os._exit, args=(1,)).start()
