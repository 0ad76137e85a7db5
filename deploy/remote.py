"""The samplers and the learner as Ray actors, behind the handles that the orchestrator takes.

Each actor is a plain class built inside its own process; Ray is applied here and nowhere else. A future of Ray becomes
one of `concurrent.futures`, and a lost actor becomes SamplerDied.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.sampler import EngineDied
from actors.settings import engine_environment
from deploy.answers import first_of_all
from system.adapters import Adapter
from system.config import Config, ConfigError
from system.orchestrator import SamplerDied
from system.tasks.problem import Problem
from system.timeline import Span
from system.trajectory import Group, Prompt, Request, Trajectory

logger = logging.getLogger(__name__)

GOODBYE_SECONDS = 2.0
START_SECONDS = 600.0
"""Longest wait for actors to be placed and built: a first start converts or fetches the model."""


class BuiltActor:
    """Builds its part when Ray builds the actor, and says by its first call what went wrong.

    An error in an actor's constructor reaches the caller as the actor's death, without its type and its message.
    """

    def __init__(self, build: Callable[..., Any], *arguments: Any) -> None:
        self._error: Exception | None = None
        try:
            self._built = build(*arguments)
        # A border: every error is kept for the first call, which raises it.
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

    def stats(self) -> dict[str, float]:
        """Memory and load of this process and its node."""
        from system.tracking import system_metrics

        return system_metrics()

    def spans(self) -> list[Span]:
        """What this process did since the last time."""
        return self.part.timeline.drain()


class SamplerActor(BuiltActor):
    """A Sampler in this process. If its engine dies, so does the process: a dead engine must not look alive."""

    def __init__(self, config: Config, problem: Problem) -> None:
        super().__init__(_build_sampler, config, problem)

    def install(self, adapter: Adapter) -> dict[str, float]:
        return self.part.install(adapter)

    def sample(self, request: Request, adapter: Adapter) -> Group:
        return self.part.sample(request, adapter)

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> list[np.ndarray]:
        return self.part.score(prompt, trajectories_K)

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

    def build(self, config: Config, problem: Problem, meeting: tuple[str, int] | None) -> None:
        super().__init__(_build_learner, config, problem, self._rank, self._store, meeting)

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        with self.part.timeline.span("update", "learner", step=self.part.step):
            return self.part.update(groups)

    def adapter(self, version: int) -> Adapter:
        with self.part.timeline.span("adapter", "learner", version=version):
            return self.part.adapter(version)

    def score(self, groups: Sequence[Group]) -> list[Any]:
        with self.part.timeline.span("score", "learner"):
            return self.part.score(groups)

    def save(self) -> np.ndarray:
        with self.part.timeline.span("save", "learner", step=self.part.step):
            return self.part.save()

    def restore(self, saved: np.ndarray, step: int) -> None:
        self.part.restore(saved, step)


def _build_sampler(config: Config, problem: Problem) -> Any:
    from actors.build import build_sampler

    return build_sampler(config, problem, on_death=_exit_soon)


def _build_learner(config: Config, problem: Problem, rank: int, store: Any, meeting: tuple[str, int] | None) -> Any:
    from learner.learner import Learner
    from learner.ranks import Ranks, reach_store
    from system.language_model import resolve_device

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


class RaySamplers:
    """A pool of sampler actors; each request goes to the least loaded one, under the adapter published last."""

    def __init__(self, config: Config, problem: Problem) -> None:
        self._config = config
        self._problem = ray.put(problem)
        self._names = (f"sampler-{number}" for number in itertools.count())
        self._actors: dict[str, Any] = {}
        self._load: dict[str, int] = {}
        self._dead: list[str] = []
        self._adapter: Any = None
        for _ in range(config.actors.count):
            self._start()

    def _start(self) -> str:
        actors, name = self._config.actors, next(self._names)
        environment = engine_environment(actors.threads, gpu=actors.gpus > 0)
        remote = ray.remote(SamplerActor).options(
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            # One thread for each group in flight, and some for installs and statistics meanwhile.
            max_concurrency=self._config.sampler.groups_in_flight + 8,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment},
        )
        self._actors[name] = remote.remote(self._config, self._problem)
        self._load[name] = 0
        return name

    def ready(self) -> list[Any]:
        """References that resolve once each sampler is built."""
        return [actor.ready.remote() for actor in self._actors.values()]

    def publish(self, adapter: Any) -> None:
        """`adapter` is an Adapter or Ray's reference to one; samplers install it with the next request at the latest."""
        self._adapter = adapter

    def install(self) -> list[Any]:
        """Asks every sampler to install the published adapter now; references to what each measured."""
        return [actor.install.remote(self._adapter) for actor in self._actors.values()]

    def sample(self, request: Request) -> Future[Group]:
        if self._adapter is None:
            raise RuntimeError("publish an adapter before asking for samples")
        while self._dead:
            self._replace(self._dead.pop())
        name = min(self._load, key=self._load.__getitem__)
        self._load[name] += 1
        reference = self._actors[name].sample.remote(request, self._adapter)
        return _future(reference, lambda error: self._settled(name, error))

    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[list[np.ndarray]]:
        """log R at every prefix of trajectories that may come from anywhere, by the first sampler."""
        actor = next(iter(self._actors.values()))
        return _future(actor.score.remote(prompt, trajectories_K))

    def stats(self) -> dict[str, Any]:
        """Name -> reference to that sampler's statistics."""
        return {name: actor.stats.remote() for name, actor in self._actors.items()}

    def spans(self) -> dict[str, Any]:
        """Name -> reference to what that sampler did since the last time."""
        return {name: actor.spans.remote() for name, actor in self._actors.items()}

    def _settled(self, name: str, error: BaseException | None) -> BaseException | None:
        """Runs in a thread of Ray's, where no actor may be started: the dead are replaced by the next request."""
        if name in self._load:
            self._load[name] -= 1
        if not isinstance(error, (RayActorError, EngineDied)):
            return error
        if name in self._actors and name not in self._dead:
            self._dead.append(name)
        return SamplerDied(str(error).splitlines()[0] if isinstance(error, RayActorError) else str(error), name)

    def _replace(self, name: str) -> None:
        if name in self._actors:
            ray.kill(self._actors.pop(name))
            del self._load[name]
            logger.warning("%s is replaced by %s", name, self._start())


class RayLearner:
    """The learner actors, one for each rank: their calls run one at a time, in order, and one death ends all.

    Every rank updates and restores; the rest is rank 0's, unless the base is in shards: then all forward together.
    """

    def __init__(self, config: Config, problem: Problem) -> None:
        learner = config.learner
        environment = {
            "OMP_NUM_THREADS": str(learner.threads),
            # Threads that spin while they wait would take the samplers' cores.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if learner.ranks > 1 and not learner.gpus:
            # All would see the same GPU, which NCCL refuses.
            environment["CUDA_VISIBLE_DEVICES"] = ""
        remote = ray.remote(LearnerActor).options(
            num_cpus=learner.cpus, num_gpus=learner.gpus, runtime_env={"env_vars": environment}
        )
        self.actors: list[Any] = [remote.remote(rank, learner.ranks) for rank in range(learner.ranks)]
        self._forwarding = self.actors if learner.shard_base else self.actors[:1]
        meeting = self.actors[0].open_meeting.remote() if learner.ranks > 1 else None
        self._building = _on(self.actors, "build", config, ray.put(problem), meeting)

    def ready(self) -> list[Any]:
        return [*self._building, *_on(self.actors, "ready")]

    def update(self, groups: Sequence[Group]) -> Future[dict[str, float]]:
        return self._answer(_on(self.actors, "update", ray.put(groups)))

    def adapter(self, version: int) -> Any:
        """A reference: the weights go from the learner to the samplers, not through the driver."""
        return _on(self._forwarding, "adapter", version)[0]

    def score(self, groups: Sequence[Group]) -> Future[list[Any]]:
        return self._answer(_on(self._forwarding, "score", ray.put(groups)))

    def save(self) -> Future[np.ndarray]:
        return _future(self.actors[0].save.remote())

    def restore(self, saved: np.ndarray, step: int) -> None:
        ray.get(_on(self.actors, "restore", ray.put(saved), step))

    def stats(self) -> dict[str, Any]:
        """Name of each rank's actor -> reference to its statistics."""
        return dict(zip(self._names(), _on(self.actors, "stats"), strict=True))

    def spans(self) -> dict[str, Any]:
        """Name of each rank's actor -> reference to what it did since the last time."""
        return dict(zip(self._names(), _on(self.actors, "spans"), strict=True))

    def _names(self) -> list[str]:
        return ["learner", *(f"learner-{rank}" for rank in range(1, len(self.actors)))]

    def _answer(self, references: Sequence[Any]) -> Future[Any]:
        """Rank 0's, once every rank has one. Errors as in `first_of_all`: a loss that is not finite is so on all ranks."""
        answers = [_future(reference) for reference in references]
        return first_of_all(answers, FloatingPointError, RayActorError, self._end) if len(answers) > 1 else answers[0]

    def _end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def _on(actors: Sequence[Any], method: str, *arguments: Any) -> list[Any]:
    """References to the answers of the actors, in their order."""
    return [getattr(actor, method).remote(*arguments) for actor in actors]


def wait_until_ready(*handles: Any) -> None:
    """Waits until every actor is built.

    Raises:
        ConfigError: they could not be placed in time; the message has what was asked for and what there is.
        Exception: what building an actor's part raised.
    """
    references = [reference for handle in handles for reference in handle.ready()]
    deadline, missing = time.monotonic() + START_SECONDS, references
    while missing:
        # One at a time: where one could not be built, those that would meet it are never ready.
        done, missing = ray.wait(missing, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            break
        try:
            ray.get(done)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(references)} actors were not placed and built within {START_SECONDS:g} s; "
            f"the cluster has {ray.cluster_resources()}, of which {ray.available_resources()} is free"
        )


def _future(reference: Any, settled: Any = lambda error: error) -> Future[Any]:
    """Ray's reference as a future of `concurrent.futures`; `settled` sees the error, or None, and may change it."""
    future: Future[Any] = Future()

    def finish(source: Future[Any]) -> None:
        error = source.exception()
        if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
            error = error.as_instanceof_cause()
        error = settled(error)
        if error is None:
            future.set_result(source.result())
        else:
            future.set_exception(error)

    reference.future().add_done_callback(finish)
    return future
