"""The learner's actors behind the handle that the orchestrator takes.

A future of Ray becomes one of `concurrent.futures`, and a learner that is lost, or says nothing for too long, LearnerDied.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from deploy import ray_cluster
from deploy.allocator import KEEPS_MEMORY, ONE_ARENA
from deploy.answers import first_of_all
from deploy.placement import Resources, rank_needs
from deploy.ray_actors import BuiltActor, LearnerActor
from deploy.ray_errors import first_line, is_loss, raised
from deploy.readiness import wait_until_ready
from system.config import Config
from system.handles import GroupLogQ, LearnerDied
from system.trajectory import Group

if TYPE_CHECKING:
    from system.tasks.problem import Problem

logger = logging.getLogger(__name__)


class RayLearner:
    """The learner actors, one for each rank: their calls run one at a time, in order, and one death ends all.

    So does a call without an answer after learner.answer_seconds: a process may be stopped, a kernel hang, a network be parted.
    Every rank updates and restores; the rest is rank 0's, unless the base is in shards: then all forward together.
    """

    replaces = False

    def __init__(self, config: Config, problem: Problem, actor: type[BuiltActor] = LearnerActor) -> None:
        """`actor` is the class of the actors, which tests change."""
        self.config = config
        self._class, self._problem = actor, ray.put(problem.outline)
        self.room: Callable[[Resources, int], AbstractContextManager[None]] = lambda each, ranks: nullcontext()
        """Makes room for the ranks of a new learner, and keeps it until they are placed: the pool's, where there is one."""
        self._start()

    def _start(self) -> None:
        learner = self.config.learner
        environment = ONE_ARENA | {
            "OMP_NUM_THREADS": str(learner.thread_count),
            # Threads that spin while they wait would take the samplers' cores.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if not learner.gpus:
            environment |= KEEPS_MEMORY
            if learner.ranks > 1:
                # All would see the same GPU, which NCCL refuses.
                environment["CUDA_VISIBLE_DEVICES"] = ""
        self.nodes = ray_cluster.learner_nodes(self.config)
        """Where the ranks are placed, if there is room; samplers go elsewhere where they can."""
        base: Any = ray.remote(self._class)
        self.actors: list[Any] = []
        for rank in range(learner.ranks):
            # One that fits no node yet takes what it finds, once there is room.
            where = ray_cluster.on(self.nodes[rank]) if rank < len(self.nodes) else {}
            remote = base.options(num_cpus=learner.cpus, num_gpus=learner.gpus, runtime_env={"env_vars": environment}, **where)
            self.actors.append(remote.remote(rank, learner.ranks))
        self._forwarding = self.actors if learner.shard_base else self.actors[:1]
        meeting = self.actors[0].open_meeting.remote() if learner.ranks > 1 else None
        building = _on(self.actors, "build", self.config, self._problem, meeting)
        self._ready = [*building, *_on(self.actors, "ready")]

    def restart(self) -> None:
        """Raises ConfigError if no node can hold a new one, LearnerDied if that is lost as well."""
        self._end()
        with self.room(rank_needs(self.config), self.config.learner.ranks):
            self._start()
            # The run went on with the samplers that there are; the learner alone has to fit.
            wait_until_ready(self, samplers=0)

    def complete(self) -> bool:
        return True

    def ready(self) -> list[Any]:
        return self._ready

    def update(self, groups: Sequence[Group]) -> Future[dict[str, float]]:
        return self._answer(_on(self.actors, "update", ray.put(groups)))

    def adapter(self, version: int) -> Any:
        """Waits for the weights, and returns a reference to them that outlives the learner and its node."""
        return ray.put(self._answer(_on(self._forwarding, "adapter", version)).result())

    def score(self, groups: Sequence[Group]) -> Future[list[GroupLogQ]]:
        return self._answer(_on(self._forwarding, "score", ray.put(groups)))

    def save(self) -> Future[np.ndarray]:
        return self._future(self.actors[0].save.remote())

    def restore(self, saved: np.ndarray, step: int) -> None:
        self._answer(_on(self.actors, "restore", ray.put(saved), step)).result()

    def named(self) -> dict[str, Any]:
        """The ranks' actors by name."""
        names = ["learner", *(f"learner-{rank}" for rank in range(1, len(self.actors)))]
        return dict(zip(names, self.actors, strict=True))

    def _answer(self, references: Sequence[Any]) -> Future[Any]:
        """Rank 0's, once every rank has one. Errors as in `first_of_all`: a loss that is not finite is so on all ranks."""
        answers = [self._future(reference) for reference in references]
        return first_of_all(answers, FloatingPointError, LearnerDied, self._end) if len(answers) > 1 else answers[0]

    def _future(self, reference: Any) -> Future[Any]:
        """Ray's reference to what the learner answers as a future of `concurrent.futures`, which fails at the deadline."""
        future: Future[Any] = Future()
        seconds, actors = self.config.learner.answer_seconds, self.actors

        def give_up() -> None:
            if _settle(future, error=LearnerDied(f"no answer within learner.answer_seconds={seconds:g}")):
                _kill(actors)

        def finish(source: Future[Any]) -> None:
            deadline.cancel()
            error = source.exception()
            if error is None:
                _settle(future, source.result())
            else:
                _settle(future, error=LearnerDied(first_line(error)) if is_loss(error) else raised(error))

        deadline = threading.Timer(seconds, give_up)
        deadline.daemon = True
        deadline.start()
        reference.future().add_done_callback(finish)
        return future

    def _end(self) -> None:
        _kill(self.actors)


def _kill(actors: Sequence[Any]) -> None:
    """Not a request to end: a process that is stopped gets SIGKILL."""
    for actor in actors:
        ray.kill(actor)


def _settle(future: Future[Any], result: Any = None, error: BaseException | None = None) -> bool:
    """False if it was settled before: an answer and its deadline may meet."""
    try:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
    except InvalidStateError:
        return False
    return True


def _on(actors: Sequence[Any], method: str, *arguments: Any) -> list[Any]:
    """References to the answers of the actors, in their order."""
    return [getattr(actor, method).remote(*arguments) for actor in actors]
