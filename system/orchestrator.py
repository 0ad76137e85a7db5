"""The loop: keep samplers fed up to the capacity gate, train on what comes back, publish what was learned.

It holds no mathematics and knows neither Ray nor vLLM: samplers and the learner are handles that answer with futures.
GFlowNet losses are valid off policy, so a group that an older adapter drew needs no correction; `max_staleness` bounds
how old it may be, and 0 makes the loop synchronous.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from system import checkpoint
from system.checkpoint import CheckpointError
from system.config import Config
from system.loop_state import Counters, LoopState
from system.requests import Requests
from system.run_error import RunError
from system.timeline import Timeline
from system.trajectory import Group, Request, merge_by_prompt

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 3
"""How often something is asked of samplers before one that is lost over it counts as a failure."""
POLL_SECONDS = 0.5
"""Longest time between two looks at a request to stop."""


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


class Issued(NamedTuple):
    """A group in flight."""

    group_id: int
    waves: int
    """Waves of deaths before it was issued."""


@dataclass
class Orchestrator:
    config: Config
    requests: Requests
    samplers: Pool
    learner: LearnerHandle
    replay: Buffer
    tracker: Tracker
    checkpoints: Path
    on_step: Callable[[Orchestrator, dict[str, float], list[Group]], None] = lambda loop, metrics, fresh: None
    """Called after each update, with its metrics and the fresh groups it used: progress and tables."""
    evaluate: Callable[[Orchestrator], None] = lambda loop: None
    """Called before the first update, every evaluate_every updates and after the last; the learner's weights are published,
    and what was learned is in a checkpoint."""
    should_stop: Callable[[], bool] = lambda: False
    counters: Counters = field(default_factory=Counters)
    timeline: Timeline = field(default_factory=Timeline)
    _reissue: deque[int] = field(default_factory=deque)
    _in_flight: dict[Future[Group], Issued] = field(default_factory=dict)
    _arrived: deque[Group] = field(default_factory=deque)
    _taken: list[Group] = field(default_factory=list)
    _adapter_steps: dict[int, int] = field(default_factory=dict)
    _deaths_before: int = 0
    """What the count of the run is ahead of that of the pool."""
    _dead: set[str] = field(default_factory=set)
    """Of those that died over a group, the names."""
    _waves: int = 0
    """Deaths of samplers, those that fell together as one."""
    _waves_in_a_row: int = 0
    _last_cause: str = ""
    _learner_deaths_in_a_row: int = 0
    _learner_is_lost: bool = False
    _saved_step: int | None = None
    """Of the last checkpoint; None: a learner begins anew."""
    _new_task: bool = False
    """The checkpoint that the run comes from is of another task, of which the learner has never been evaluated."""
    _failure: Exception | None = None
    """What the samplers ended the run with during an update, which comes to its end all the same."""
    _since_saved: list[list[Group]] = field(default_factory=list)
    """The batches of the updates since then: a new learner does them again, so that a death of the old one costs time alone."""

    def train(self) -> None:
        """Runs until learner.steps updates are done or a stop is asked for. Whatever ends it, an error too, a checkpoint has
        what was learned, unless the learner itself is lost.

        Raises:
            RunError: samplers died more than actors.max_deaths times with no group in between, or the learner with no
                checkpoint; or more than sampler.max_reward_faults samples had no reward.
        """
        try:
            self._train()
        except Exception as error:
            self._keep(error)
            raise

    def _train(self) -> None:
        settings = self.config.learner
        evaluate_every = settings.evaluate_every or settings.steps
        self._deaths_before = self.counters.deaths - self.samplers.deaths
        self.publish()
        # Before the first update, and of a run that was cut off between a checkpoint and an evaluation.
        if self._due(evaluate_every) or self._new_task:
            self._evaluate()
        began = time.perf_counter()
        while self.counters.step < settings.steps and not self.should_stop():
            asked = time.perf_counter()
            with self.timeline.span("wait for groups", "loop", step=self.counters.step):
                collected = self._collect(settings.groups_per_update)
            waited = time.perf_counter() - asked
            if not collected:
                break
            # In the order of their numbers, not of their arrival: a synchronous run repeats itself to the bit.
            self._taken.sort(key=lambda group: group.group_id)
            for group in self._taken:
                self.replay.add(group)
            rng = np.random.default_rng((self.config.seed, 4, self.counters.step))
            batch = [self.replay.mix(group, rng) for group in merge_by_prompt(self._taken)]
            with self.timeline.span("update", "loop", step=self.counters.step):
                metrics = self.with_learner(lambda batch=batch: self._update(batch))
            self._since_saved.append(batch)
            now = time.perf_counter()
            self._account(metrics, waited, now - began)
            if self._failure is not None:
                raise self._failure
            began = now
            # An evaluation draws from the weights that it scores.
            if self._due(settings.publish_every) or self._due(evaluate_every):
                self.publish()
            # An evaluation takes long, and may be cut off.
            if self._due(settings.checkpoint_every) or self._due(evaluate_every):
                self.checkpoint()
            if self._due(evaluate_every) and not (self.should_stop() and self.counters.step < settings.steps):
                self._evaluate()
                began = time.perf_counter()  # it is no part of the next step
        if self._saved_step != self.counters.step:
            self.checkpoint()

    def _keep(self, error: Exception) -> None:
        """A checkpoint before the run ends by `error`, which is what the run is to say of its end: not why there is none."""
        if self._learner_is_lost or self._saved_step == self.counters.step or isinstance(error, CheckpointError):
            return
        try:
            # Of the learner as it is: where it is gone too, a new one would have to be placed first.
            self._write(self.learner.save().result())
        except CheckpointError as cause:
            # Its message is all that there is to know: the disk, and what to do about it.
            logger.error("what was learned since the last checkpoint is lost: %s", cause)
        except Exception:
            logger.exception("what was learned since the last checkpoint is lost")

    def _update(self, batch: list[Group]) -> dict[str, float]:
        update = self.learner.update(batch)
        while not update.done() and self._failure is None:
            try:
                self._feed()
                self._receive(update)
            # The learner goes on: raised before it is counted, the checkpoint would have its weights under the step before.
            except Exception as error:
                self._failure = error
        try:
            return update.result()
        except Exception:
            if self._failure is not None:
                logger.error("before the update's error the samplers had one, which ends the run too: %s", self._failure)
            raise

    def _evaluate(self) -> None:
        with self.timeline.span("evaluate", "loop", step=self.counters.step):
            self.with_learner(lambda: self.evaluate(self))

    def _due(self, every: int) -> bool:
        return self.counters.step % every == 0 or self.counters.step == self.config.learner.steps

    def publish(self) -> None:
        """The learner's weights as a new version, which every request from now on names."""
        self.with_learner(self._publish)

    def _publish(self) -> None:
        # A number is used once, even if the learner dies over it: no version ever stands for two sets of weights.
        self.counters.version += 1
        with self.timeline.span("publish", "loop", version=self.counters.version):
            adapter = self.learner.adapter(self.counters.version)
            self.counters.published_step = self.counters.step
            self._adapter_steps[self.counters.version] = self.counters.step
            self.samplers.publish(adapter)

    # -------------------------------------------------------------------------------------- a learner that may die

    def with_learner(self, call: Callable[[], T]) -> T:
        """What `call` returns. If the learner dies over it, it is made again with a new one that knows as much."""
        died = False
        while True:
            try:
                if died:
                    self._revive()
                return call()
            except LearnerDied as death:
                died = self._learner_is_lost = True
                self._count_learner_death(death)

    def _count_learner_death(self, death: LearnerDied) -> None:
        self.counters.learner_deaths += 1
        self._learner_deaths_in_a_row += 1
        logger.warning("the learner died at step %d and is started again: %s", self.counters.step, death)
        if self._learner_deaths_in_a_row > self.config.actors.max_deaths:
            raise RunError(
                f"the learner died {self._learner_deaths_in_a_row} times with no checkpoint in between (actors.max_deaths="
                f"{self.config.actors.max_deaths}); the last cause: {death}"
            ) from death

    def _revive(self) -> None:
        """A new learner: from the last checkpoint, and then the updates since, on the batches that they had.

        The loop itself stays where it is: nothing is sampled, logged or counted again, and no group is lost.
        """
        with self.timeline.span("revive the learner", "loop", step=self.counters.step):
            self.learner.restart()
            if self._saved_step is not None:
                files = checkpoint.read_latest(self.checkpoints, self._saved_step)
                self.learner.restore(LoopState.of(files).learner, self._saved_step)
            for batch in self._since_saved:
                self.learner.update(batch).result()
            self._learner_is_lost = False
            # The adapter published last may have been on a node that is gone.
            self._publish()

    # ------------------------------------------------------------------------------------------------ the groups

    def _open(self) -> bool:
        """The capacity gate: a group issued now would be fresh enough when its turn comes.

        Groups are used in the order of their arrival, groups_per_update at a time, so everything in flight or waiting
        is used first. Right after a publication this reads: (max_staleness + 1) * groups_per_update exceeds them.
        """
        ahead = len(self._in_flight) + len(self._arrived) + len(self._taken)
        used_at = self.counters.step + ahead // self.config.learner.groups_per_update
        return (
            used_at - self.counters.published_step <= self.config.learner.max_staleness and used_at < self.config.learner.steps
        )

    def _feed(self) -> None:
        while self._open():
            if self._reissue:
                group_id = self._reissue.popleft()
            else:
                group_id, self.counters.next_group = self.counters.next_group, self.counters.next_group + 1
            self._in_flight[self.samplers.sample(self.requests.training(group_id))] = Issued(group_id, self._waves)

    def _receive(self, update: Future[dict[str, float]] | None = None) -> None:
        """Takes in the groups that have come back, waiting a little if there is none."""
        awaited: list[Future[Any]] = [*self._in_flight, *([update] if update else [])]
        done, _ = wait(awaited, POLL_SECONDS, FIRST_COMPLETED)
        self.counters.deaths = self._deaths_before + self.samplers.deaths
        # Of those that came back together the one issued first: it is the stalest.
        for future in [future for future in self._in_flight if future in done]:
            issued = self._in_flight.pop(future)
            try:
                group = future.result()
            # Whatever went wrong, the group is still to be sampled: now, or by the run that is resumed.
            except Exception as error:
                self._reissue.append(issued.group_id)
                if not isinstance(error, SamplerDied):
                    raise
                self._mourn(issued, error)
                continue
            self._waves_in_a_row = 0
            self._arrived.append(group)

    def _usable(self, group: Group) -> bool:
        """Tolerated on purpose, up to a limit: samples without a reward. A group that they leave fewer than two is given up."""
        if not group.faults:
            return True
        counters, limit = self.counters, self.config.sampler.max_reward_faults
        logger.warning("group %d: %d samples have no reward; the first: %s", group.group_id, len(group.faults), group.faults[0])
        if (faults := counters.reward_faults + len(group.faults)) > limit:
            # With a mended reward the run goes on from here, and this group is sampled again.
            self._reissue.append(group.group_id)
            raise RunError(
                f"{faults} samples had no reward, more than sampler.max_reward_faults={limit}; mend the reward "
                f"or raise the limit, and resume; the last: {group.faults[-1]}"
            )
        counters.reward_faults = faults
        # A demonstration is alone by its nature.
        given_up = len(group) < 2
        counters.given_up += given_up
        return not given_up

    def _mourn(self, issued: Issued, death: SamplerDied) -> None:
        """Tolerated on purpose: a lost sampler costs time, not groups. Its request is issued again under its number."""
        self.counters.reissued += 1
        cause, name = death.args
        logger.warning("group %d is issued again: %s", issued.group_id, death)
        if isinstance(death, SamplerLeft) or name in self._dead:
            return
        self._dead.add(name)
        self._last_cause = cause
        # Samplers that were lost together, with their node for example, are one wave: all their requests are from before it.
        if issued.waves == self._waves:
            self._waves += 1
            self._waves_in_a_row += 1

    def _collect(self, wanted: int) -> bool:
        """Takes the next `wanted` groups that are fresh enough; False if a stop was asked for meanwhile."""
        while len(self._taken) < wanted:
            if self.should_stop():
                return False
            if self._waves_in_a_row > (limit := self.config.actors.max_deaths):
                raise RunError(
                    f"samplers died {self._waves_in_a_row} times with no group in between (actors.max_deaths={limit}); "
                    f"the last cause: {self._last_cause}"
                )
            self._feed()
            if not self._arrived:
                self._receive()
                continue
            group = self._arrived.popleft()
            if not self._usable(group):
                continue
            if self._staleness(group) > self.config.learner.max_staleness:
                self.counters.too_stale += 1
                self.replay.add(group)
            else:
                self._taken.append(group)
        return True

    def _staleness(self, group: Group) -> int:
        """Updates between the adapter that drew a group and the update that uses it now."""
        return self.counters.step - self._adapter_steps[group.adapter_version]

    def _account(self, metrics: dict[str, float], wait_seconds: float, step_seconds: float) -> None:
        """A step is what was published and saved after the update before, the wait for groups, and the update."""
        fresh, self._taken = self._taken, []
        staleness = float(np.mean([self._staleness(group) for group in fresh]))
        trajectories = [trajectory for group in fresh for trajectory in group.trajectories_K]
        tokens = sum(group.tokens for group in fresh)
        counters = self.counters
        counters.step += 1
        counters.groups += len(fresh)
        counters.trajectories += len(trajectories)
        counters.sampled_tokens += tokens
        counters.seconds += step_seconds
        counters.learner_busy_seconds += step_seconds - wait_seconds
        lengths = [len(trajectory) for trajectory in trajectories]
        metrics = metrics | {
            "staleness": staleness,
            "length/mean": float(np.mean(lengths)),
            "length/max": float(np.max(lengths)),
            "forced_stops": float(np.mean([trajectory.stop == "forced" for trajectory in trajectories])),
            "log_reward/mean": float(np.mean([values[-1] for group in fresh for values in group.log_reward_K])),
            "log_reward/max": float(np.max([values[-1] for group in fresh for values in group.log_reward_K])),
            "replay/size": float(len(self.replay)),
            "groups/in_flight": float(len(self._in_flight)),
            "groups/waiting": float(len(self._arrived)),
            "groups/too_stale": float(counters.too_stale),
            "groups/given_up": float(counters.given_up),
            "groups/reissued": float(counters.reissued),
            "reward_faults": float(counters.reward_faults),
            "samplers/deaths": float(counters.deaths),
            "learner/deaths": float(counters.learner_deaths),
            "seconds/step": step_seconds,
            "seconds/wait": wait_seconds,
            "idle/learner": wait_seconds / step_seconds,
            "rate/trajectories_per_second": len(trajectories) / step_seconds,
            "rate/sampled_tokens_per_second": tokens / step_seconds,
        }
        self.tracker.metrics(metrics, counters.step)
        self.on_step(self, metrics, fresh)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def checkpoint(self) -> Path:
        """Everything that the rest of the run depends on. Groups issued and not used are noted by number alone."""
        with self.timeline.span("checkpoint", "loop", step=self.counters.step):
            return self._write(self.with_learner(lambda: self.learner.save().result()))

    def _write(self, saved: np.ndarray) -> Path:
        waiting = [group.group_id for group in (*self._arrived, *self._taken)]
        unused = sorted([*(issued.group_id for issued in self._in_flight.values()), *waiting, *self._reissue])
        task = self.config.task.model_dump(mode="json")
        state = LoopState(self.counters, unused, self.replay.save(), task, saved)
        path = checkpoint.write(self.checkpoints, self.counters.step, state.files())
        self._saved_step, self._since_saved, self._learner_deaths_in_a_row = self.counters.step, [], 0
        return path

    def restore(self, state: LoopState) -> None:
        """Takes the loop's part of a checkpoint; the learner's is the caller's to give it."""
        self.counters = state.counters
        self._reissue = deque(state.unused_groups)
        self._new_task = not state.is_of(self.config.task)
        arrays, records = state.replay
        if not self._new_task:
            self.replay.restore(arrays, records)
        elif records:
            # Of other prompts, lengths or rewards: nothing in it is true of this task.
            logger.warning("the task is another than that of the checkpoint, whose replay buffer is left out")
        self._saved_step, self._since_saved = self.counters.step, []
