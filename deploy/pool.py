"""The samplers as Ray actors, behind the handle that the orchestrator takes: a pool that replaces the lost and fits its size.

One thread owns the pool. Whatever happens (a request, an answer, an actor that is built, a death) is a message to it, so
that an answer either comes in time and counts, or comes late and is dropped: a request is never answered twice.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.sampler import EngineDied
from actors.settings import engine_environment
from deploy import ray_cluster
from deploy.allocator import ONE_ARENA
from deploy.placement import Resources, sampler_needs
from deploy.pool_size import PoolSize
from deploy.ray_actors import BuiltActor, SamplerActor
from deploy.ray_errors import first_line, is_loss, raised
from system.config import Config
from system.handles import SamplerDied, SamplerLeft
from system.run_error import RunError
from system.scores import Scores
from system.tasks.problem import Problem
from system.trajectory import Group, Prompt, Request, Trajectory

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""Longest time between two looks at the deadlines."""
ROOM_SECONDS = 8.0
"""Until what a killed process held is free; a stopped one takes 5 s to go."""
SCORES = 4
"""Calls for rewards alone that a sampler is given at a time: it scores one after the other."""
SPARE_THREADS = 4
"""Of an actor, besides those for groups and scores: for statistics and signs of life."""
QUESTIONS = 4
"""To a silent sampler that has work, how far it is, before it is given up."""
LONGEST_PAUSE = 60.0
"""Seconds before the next start, after starts that failed; the first pause is 2 s, and each is twice the one before."""


@dataclass(eq=False)
class _Call:
    """Something that any sampler may do."""

    ask: Callable[[Any, Any], Any]
    """Of (actor, adapter) Ray's reference to the answer."""
    request: Request | None = None
    """What is to be drawn."""
    future: Future[Any] = field(default_factory=Future)

    @property
    def trains(self) -> bool:
        """It is a group of the training; those of an evaluation have negative numbers."""
        return self.request is not None and self.request.group_id >= 0

    @property
    def samples(self) -> int:
        """That the engine is to draw for it."""
        return len(self.request.behaviours_K) if self.request else 0


@dataclass(eq=False)
class _Member:
    name: str
    actor: Any
    built: Any
    """Reference to its first answer."""
    heard: float
    """When it was started, then when it answered last, got further, or was given work after a rest."""
    progress: int = -1
    """Of its work, as it was told last."""
    asked: float = 0.0
    """When that was asked for."""
    is_built: bool = False
    calls: list[_Call] = field(default_factory=list)

    def is_full(self, call: _Call, max_num_seqs: int) -> bool:
        """With another call like that its engine or its threads would have more than they can take."""
        if call.samples:
            return sum(call.samples for call in self.calls) >= max_num_seqs + call.samples
        return sum(not call.samples for call in self.calls) >= SCORES


class RaySamplers:
    """A pool of sampler actors; each request goes to the least loaded one, under the adapter published last. A sampler is given
    no more than fills its engine: the rest waits for one that is free, or that joins.

    It starts with actors.min, and `fit` moves it between that and actors.max. A request waits while no sampler is there to
    take it, and a sampler that no node has room for waits for one: of more than the fewest not for ever.
    """

    replaces = True

    def __init__(
        self,
        config: Config,
        problem: Problem,
        learner_nodes: Callable[[], Collection[str]] = lambda: (),
        actor: type[BuiltActor] = SamplerActor,
    ) -> None:
        """Samplers keep off `learner_nodes` where they can. `actor` is the class of the actors, which tests change."""
        self.config = config
        self._class, self._problem, self._learner_nodes = actor, ray.put(problem.outline), learner_nodes
        self._names = (f"sampler-{number}" for number in itertools.count())
        self._members: dict[str, _Member] = {}
        self._waiting: deque[_Call] = deque()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._adapter: Any = None
        self._size = PoolSize(config.actors.fewest, config.actors.most)
        self._failed_starts, self._failed_at, self._start_after = 0, 0.0, 0.0
        smallest = min(config.sampler.samples_per_prompt, config.learner.evaluation_samples)
        self._threads = config.sampler.groups_at_once(smallest) + SCORES + SPARE_THREADS
        self.deaths = 0
        """Samplers that died, with work or without; not those that the pool itself ended."""
        self._paused = self._closed = False
        self._ended: BaseException | None = None
        self._fill()
        self._thread = threading.Thread(target=self._run, name="samplers", daemon=True)
        self._thread.start()

    # --------------------------------------------------------------------------------------------- for any thread

    def publish(self, adapter: Any) -> None:
        """`adapter` is an Adapter or Ray's reference to one; a sampler installs it with its next request."""
        self._adapter = adapter

    def sample(self, request: Request) -> Future[Group]:
        if self._adapter is None:
            raise RuntimeError("publish an adapter before asking for samples")
        return self._submit(_Call(lambda actor, adapter: actor.sample.remote(request, adapter), request))

    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
        """log R at every prefix of trajectories that may come from anywhere."""
        return self._submit(_Call(lambda actor, adapter: actor.score.remote(prompt, trajectories_K)))

    def fit(self, learner_idle: float) -> None:
        """After a step: another sampler, if there may be more, the learner waited for `learner_idle` of the step and there is
        work for it; one less, if there was not work for all for long."""
        self._inbox.put(lambda: self._consider(learner_idle))

    def complete(self) -> bool:
        return len(self._members) >= self._size.target

    def ready(self) -> list[Any]:
        """References that resolve once each sampler is built."""
        return [member.built for member in list(self._members.values())]

    def named(self) -> dict[str, Any]:
        """The actors that are built, by name."""
        return {member.name: member.actor for member in self._built()}

    @contextmanager
    def room(self, each: Resources, copies: int) -> Iterator[None]:
        """Nodes have `copies` times `each` free if the samplers can make it so, and no sampler is started meanwhile."""
        self._paused = True
        try:
            found = _within(ROOM_SECONDS, lambda: ray_cluster.has_room(each, copies))
            while self._ended is None and self._members and not found and ray_cluster.could_have_room(each, copies):
                left = len(self._members)
                self._inbox.put(self._give_way)
                found = _within(
                    ROOM_SECONDS, lambda left=left: len(self._members) < left and ray_cluster.has_room(each, copies)
                )
            yield
        finally:
            self._paused = False

    def close(self) -> None:
        """Ends the samplers; what was asked of them fails. May be called twice."""
        self._inbox.put(self._close)
        self._thread.join()

    def _close(self) -> None:
        self._closed = True

    def _built(self) -> list[_Member]:
        return [member for member in list(self._members.values()) if member.is_built]

    def _submit(self, call: _Call) -> Future[Any]:
        self._waiting.append(call)
        if self._ended:
            self._fail_waiting(self._ended)
        self._inbox.put(lambda: None)
        return call.future

    def _fail_waiting(self, error: BaseException) -> None:
        with suppress(IndexError):  # at the end the pool's thread and a caller's may both take from it
            while True:
                self._waiting.popleft().future.set_exception(error)

    # ---------------------------------------------------------------------------------------- in the pool's thread

    def _run(self) -> None:
        try:
            # Without Ray there is no pool: starting an actor would start a cluster.
            while not self._closed and ray.is_initialized():
                self._hear()
                self._watch()
                self._fill()
                self._dispatch()
            self._ended = RuntimeError("the pool of samplers was closed")
        # A border: whatever ends this thread must reach those who wait for it.
        except BaseException as error:
            logger.exception("the pool of samplers fails")
            self._ended = error
        self._fail_waiting(self._ended)
        for member in self._members.values():
            if ray.is_initialized():
                ray.kill(member.actor)
            for call in member.calls:
                call.future.set_exception(self._ended)

    def _hear(self) -> None:
        try:
            self._inbox.get(timeout=TICK_SECONDS)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _watch(self) -> None:
        """Gives up samplers that get nowhere: a process may be stopped, a kernel or a reward hang, a network be parted."""
        actors, now = self.config.actors, time.monotonic()
        for member in list(self._members.values()):
            silent = now - member.heard
            if not member.is_built and silent > actors.start_seconds:
                late = f"it was not built within actors.start_seconds={actors.start_seconds:g}"
                if self._size.give_up():
                    # No node has room for it, as a rule: no death, and nothing that the others are to wait for.
                    self._lose(member, late, SamplerLeft)
                else:
                    self._failed(member, TimeoutError(late))
            elif member.calls and silent > actors.answer_seconds:
                self._lose(member, f"it has work and got no further for actors.answer_seconds={actors.answer_seconds:g}")
            elif member.calls and min(silent, now - member.asked) > actors.answer_seconds / QUESTIONS:
                member.asked = now
                self._when_done(member.actor.progress.remote(), lambda source, member=member: self._told(member, source))
            elif member.is_built and silent > actors.answer_seconds:
                # One that rests is asked for a sign of life: it may be needed soon.
                self._give(member, _Call(lambda actor, adapter: actor.ready.remote()))

    def _told(self, member: _Member, source: Future[Any]) -> None:
        """How far a busy sampler is. What is wrong with one that cannot say shows elsewhere."""
        if source.exception() is None and (progress := source.result()) > member.progress:
            member.progress, member.heard = progress, time.monotonic()

    def _fill(self) -> None:
        while not self._paused and len(self._members) < self._size.target and time.monotonic() >= self._start_after:
            self._start()

    def _start(self) -> None:
        actors, name = self.config.actors, next(self._names)
        remote: Any = ray.remote(self._class)
        actor = remote.options(
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            max_concurrency=self._threads,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": ONE_ARENA | engine_environment(actors.threads, gpu=actors.gpus > 0)},
            **ray_cluster.off(self._learner_nodes()),
        ).remote(self.config, self._problem)
        member = _Member(name, actor, actor.ready.remote(), time.monotonic())
        self._members[name] = member
        self._when_done(member.built, lambda source: self._was_built(member, source))
        self._when_done(actor.until_death.remote(), lambda source: self._died(member, source))

    def _when_done(self, reference: Any, message: Callable[[Future[Any]], None]) -> None:
        reference.future().add_done_callback(lambda source: self._inbox.put(lambda: message(source)))

    def _was_built(self, member: _Member, source: Future[Any]) -> None:
        if member.name not in self._members:
            return
        if (error := source.exception()) is not None:
            self._failed(member, raised(error))
        else:
            member.is_built, member.heard, self._failed_starts = True, time.monotonic(), 0

    def _died(self, member: _Member, source: Future[Any]) -> None:
        """Also of a sampler that has no work; one that was not built yet is `_was_built`'s."""
        if member.name in self._members and member.is_built:
            self._lose(member, first_line(source.exception() or RuntimeError("its process ended")))

    def _failed(self, member: _Member, error: BaseException) -> None:
        """A start that failed. After too many a sampler that need not be there is no longer wanted, and those who wait are told
        if none is left."""
        self._lose(member, first_line(error))
        # Those that were begun before the last failure failed with it: a node that is gone counts once.
        if member.heard > self._failed_at:
            self._failed_starts += 1
            self._failed_at = time.monotonic()
        self._start_after = time.monotonic() + min(LONGEST_PAUSE, 2.0**self._failed_starts)
        if self._failed_starts <= self.config.actors.max_deaths:
            return
        if self._built():
            self._size.give_up()
        else:
            message = (
                f"samplers could not be started {self._failed_starts} times in a row (actors.max_deaths="
                f"{self.config.actors.max_deaths}) and none is left; the last cause: {first_line(error)}"
            )
            self._fail_waiting(RunError(message))

    def _lose(self, member: _Member, cause: str, kind: type[SamplerDied] = SamplerDied) -> None:
        """Ends a sampler, which may be dead already. Its calls fail now; what it might still answer is dropped."""
        logger.warning("%s is given up: %s", member.name, cause)
        del self._members[member.name]
        self.deaths += kind is SamplerDied
        # Not a request to end: a process that is stopped gets SIGKILL.
        ray.kill(member.actor, no_restart=True)
        calls, member.calls = member.calls, []
        for call in calls:
            call.future.set_exception(kind(cause, member.name))

    def _give_way(self) -> None:
        """One sampler less, for the learner: one that does not work yet, or else the newest."""
        if members := sorted(self._members.values(), key=lambda member: member.is_built, reverse=True):
            self._lose(members[-1], "it gives way to the learner", SamplerLeft)

    def _dispatch(self) -> None:
        calls = [*self._waiting, *(call for member in self._members.values() for call in member.calls)]
        self._size.asked(sum(call.trains for call in calls))
        built = self._built()
        while self._waiting and built:
            # Of those with the least work, the one that has rested longest: one that hangs is found when it has work.
            member, call = min(built, key=lambda member: (len(member.calls), member.heard)), self._waiting[0]
            if member.is_full(call, self.config.sampler.max_num_seqs):
                break
            self._give(member, self._waiting.popleft())

    def _give(self, member: _Member, call: _Call) -> None:
        if not member.calls:
            member.heard = time.monotonic()
        member.calls.append(call)
        self._when_done(call.ask(member.actor, self._adapter), lambda source: self._answered(member, call, source))

    def _answered(self, member: _Member, call: _Call, source: Future[Any]) -> None:
        if call not in member.calls:
            return
        error = source.exception()
        error = error and raised(error)
        if isinstance(error, EngineDied) or (error and is_loss(error)):
            self._lose(member, first_line(error))
            return
        member.calls.remove(call)
        member.heard = time.monotonic()
        if error:
            call.future.set_exception(error)
        else:
            call.future.set_result(source.result())

    def _consider(self, learner_idle: float) -> None:
        resting = [member for member in self._members.values() if not member.calls]
        change = self._size.after_step(learner_idle, built=len(self._built()), one_rests=bool(resting), has_room=self._has_room)
        if change > 0:
            logger.info("the learner waits %.0f%% of its time: sampler %d is started", 100 * learner_idle, self._size.target)
        elif change < 0:
            self._lose(resting[-1], "the others do all the work that there is", SamplerLeft)

    def _has_room(self) -> bool:
        """For another sampler; a cluster that adds nodes does so for actors that wait for one."""
        return bool(self.config.cluster.wait_seconds) or ray_cluster.has_room(sampler_needs(self.config))


def _within(seconds: float, true: Callable[[], bool]) -> bool:
    """Waits for `true`, at most so long."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.1)
    return found
