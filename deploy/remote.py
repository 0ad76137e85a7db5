"""The learner's actors behind the handle that the orchestrator takes, and what it shares with the pool of samplers.

A future of Ray becomes one of `concurrent.futures`, and a learner that is lost, or says nothing for too long, LearnerDied.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from deploy import ray_cluster
from deploy.allocator import ONE_ARENA
from deploy.answers import first_of_all
from deploy.placement import Resources
from deploy.ray_actors import BuiltActor, LearnerActor
from system.config import Config, ConfigError
from system.handles import LearnerDied
from system.run_error import RunError
from system.trajectory import Group

if TYPE_CHECKING:
    from system.tasks.problem import Problem

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the cluster while actors are not placed."""
TELL_SECONDS = 60.0
"""Between two warnings that some still wait: for their turn on a cluster that others use, say."""


class Handle(Protocol):
    """Actors that may still be starting."""

    config: Config
    replaces: bool
    """An actor that is lost gets a successor, to which `ready` then refers."""

    def complete(self) -> bool:
        """All actors are started: none has yet to be replaced."""
        ...

    def ready(self) -> list[Any]:
        """A reference for each, which resolves once it is built."""
        ...


class RayLearner:
    """The learner actors, one for each rank: their calls run one at a time, in order, and one death ends all.

    So does a call without an answer after learner.answer_seconds: a process may be stopped, a kernel hang, a network be parted.
    Every rank updates and restores; the rest is rank 0's, unless the base is in shards: then all forward together.
    """

    replaces = False

    def __init__(self, config: Config, problem: Problem, actor: type[BuiltActor] = LearnerActor) -> None:
        """`actor` is the class of the actors, which tests change."""
        self.config = config
        self._class, self._problem = actor, ray.put(problem)
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
        if learner.ranks > 1 and not learner.gpus:
            # All would see the same GPU, which NCCL refuses.
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.nodes = ray_cluster.learner_nodes(self.config)
        """Where the ranks are placed, if there is room; samplers go elsewhere where they can."""
        base: Any = ray.remote(self._class)
        preferred = [ray_cluster.on(node) for node in self.nodes]
        # The others take what they find, once there is room.
        preferred += [{}] * (learner.ranks - len(preferred))
        self.actors: list[Any] = []
        for rank, where in enumerate(preferred):
            remote = base.options(num_cpus=learner.cpus, num_gpus=learner.gpus, runtime_env={"env_vars": environment}, **where)
            self.actors.append(remote.remote(rank, learner.ranks))
        self._forwarding = self.actors if learner.shard_base else self.actors[:1]
        meeting = self.actors[0].open_meeting.remote() if learner.ranks > 1 else None
        building = _on(self.actors, "build", self.config, self._problem, meeting)
        self._ready = [*building, *_on(self.actors, "ready")]

    def restart(self) -> None:
        """Raises ConfigError if no node can hold a new one, LearnerDied if that is lost as well."""
        self._end()
        learner = self.config.learner
        with self.room(Resources(learner.cpus, learner.gpus), learner.ranks):
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

    def score(self, groups: Sequence[Group]) -> Future[list[Any]]:
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


def wait_until_ready(*handles: Handle, samplers: int | None = None) -> None:
    """Waits until every actor is built.

    Raises:
        ConfigError: the learner and `samplers` (by default the fewest) fit no nodes, or were not placed and built in time;
            the message has what was asked for and what there is.
        RunError: actors were lost over it more than actors.max_deaths times, those that are lost together counting once.
        LearnerDied: the learner, which has no successor, was lost.
        Exception: what building an actor's part raised.
    """
    config, began, lost, waves = handles[0].config, time.monotonic(), set(), 0
    tell_after = TELL_SECONDS
    while True:
        owners = {reference: handle for handle in handles for reference in handle.ready()}
        done, missing = ray.wait(list(owners), num_returns=len(owners), timeout=LOOK_SECONDS)
        losses = {reference: loss for reference in done if (loss := _loss(reference)) is not None}
        for reference, loss in losses.items():
            if not owners[reference].replaces:
                raise LearnerDied(
                    f"the learner was lost before it was built: {first_line(loss)}; where its memory is too small, "
                    "learner.dtype=bfloat16 takes half, and learner.shard_base=true shares the layers over learner.ranks"
                ) from loss
            missing.append(reference)
        waves += not lost.issuperset(losses)
        lost.update(losses)
        if waves > config.actors.max_deaths:
            cause = list(losses.values())[-1]
            raise RunError(
                f"actors were lost before they were built {waves} times (actors.max_deaths={config.actors.max_deaths}); "
                f"the last cause: {first_line(cause)}"
            ) from cause
        if not missing and all(handle.complete() for handle in handles):
            return
        waited = time.monotonic() - began
        ray_cluster.check(config, waited, samplers)
        there = f"the cluster has {_shown(ray.cluster_resources())}, of which {_shown(ray.available_resources())} is free"
        if missing and waited > config.actors.start_seconds:
            raise ConfigError(
                f"{len(missing)} of {len(owners)} actors were not placed and built within actors.start_seconds="
                f"{config.actors.start_seconds:g}; {there}"
            )
        if missing and waited > tell_after:
            logger.warning(
                "%d of %d actors are not placed and built after %.0f s; %s", len(missing), len(owners), waited, there
            )
            tell_after += TELL_SECONDS
        if lost.issuperset(missing):
            time.sleep(LOOK_SECONDS)  # until their successors are started


def _loss(built: Any) -> RayError | None:
    """How an actor was lost; None if it is built. Raises what building its part raised."""
    try:
        ray.get(built)
    except RayTaskError as error:
        raise raised(error) from None
    except RayError as error:
        return error
    return None


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))


def raised(error: BaseException) -> BaseException:
    """What a call raised in an actor, as its caller would have seen it there; any other error as it is."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.as_instanceof_cause()
    return error


def is_loss(error: BaseException) -> bool:
    """The actor is gone, or its node is, or the way to it."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def first_line(error: BaseException) -> str:
    """What went wrong, without what Ray puts in front of it: the traceback in an actor, or which actor died."""
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    lines = str(cause).splitlines()
    if isinstance(cause, ActorDiedError):
        # The first line says that an actor died, the indented ones which it was, and only then comes why.
        lines = [line.partition(" Some common causes")[0] for line in lines[1:] if not line.startswith("\t")] or lines
    return next(iter(lines), type(cause).__name__)
