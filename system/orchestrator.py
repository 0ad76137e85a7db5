"""The loop: keep samplers fed as far as `max_staleness` allows, train on what comes back, publish what was learned.

It holds no mathematics and knows neither Ray nor vLLM: samplers and the learner are handles that answer with futures.
GFlowNet losses are valid off policy, so a group that an older adapter drew needs no correction; `max_staleness` bounds how
old what is asked for will be, and 0 makes the loop synchronous.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from system import checkpoint, step_metrics
from system.checkpoint import CheckpointError
from system.config import Config
from system.group_flow import GroupFlow
from system.handles import Buffer, LearnerDied, LearnerHandle, Pool, Tracker
from system.lasting_learner import LastingLearner
from system.loop_state import Counters, LoopState
from system.requests import Requests
from system.step_clock import StepClock
from system.timeline import Timeline
from system.trajectory import Group, merge_by_prompt

logger = logging.getLogger(__name__)


@dataclass
class Orchestrator:
    """Samplers, a learner, a buffer and a tracker, at work together until the last update."""

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
    """Called before the first update, every evaluate_every updates, and after the last. A checkpoint has been written; unless a
    stop was asked for, no group is in flight."""
    evaluation_draws: bool = True
    """Evaluations draw from the samplers, to which the learner's weights are published first."""
    should_stop: Callable[[], bool] = lambda: False
    timeline: Timeline = field(default_factory=Timeline)
    flow: GroupFlow = field(init=False)
    lasting: LastingLearner = field(init=False)
    _clock: StepClock = field(default_factory=StepClock, init=False)
    """Stands still for evaluations."""
    _new_task: bool = field(default=False, init=False)
    """The checkpoint that the run comes from is of another task, of which the learner has never been evaluated."""
    _failure: Exception | None = field(default=None, init=False)
    """An error of the samplers during an update, which is raised once the update is counted."""

    def __post_init__(self) -> None:
        self.flow = GroupFlow(self.config, self.requests, self.samplers)
        self.lasting = LastingLearner(
            self.learner, self.checkpoints, self.config.actors.max_deaths, self.timeline, self._learner_died, self._publish
        )

    @property
    def counters(self) -> Counters:
        return self.flow.counters

    def train(self) -> None:
        """Runs until learner.steps updates are done or a stop is asked for. Whatever ends it, an error too, a checkpoint has
        what was learned, unless the learner itself is lost, or a KeyboardInterrupt asks for the end at once.

        Raises:
            RunError: samplers died more than actors.max_deaths times with no group in between or over the same group, or the
                learner with no checkpoint; or more than sampler.max_reward_faults recent samples had no reward.
            FloatingPointError: the loss or its gradient is not finite.
            CheckpointError: a checkpoint could not be written.
            Exception: what a sampler or a reward raised.
        """
        try:
            self._train()
        except Exception as error:
            self._keep(error)
            raise

    def _train(self) -> None:
        self.flow.begin()
        self.publish()
        # Before the first update, and of a run that was cut off between a checkpoint and an evaluation.
        if self._evaluation_is_due() or self._new_task:
            self._evaluate()
        self._clock = StepClock()
        while self._goes_on() and self._collect():
            batch = self._batch()
            with self.timeline.span("update", "loop", step=self.counters.step):
                metrics = self.lasting.ask(lambda batch=batch: self._update(batch))
            self.lasting.updated(batch)
            self._account(metrics | {"replay/share": self._replayed(batch)})
            if self._failure is not None:
                raise self._failure
            self._follow_up()
        if self.lasting.saved_step != self.counters.step:
            self.checkpoint()

    def _goes_on(self) -> bool:
        return self.counters.step < self.config.learner.steps and not self.should_stop()

    def _collect(self) -> bool:
        """Waits for the groups of an update; False if a stop was asked for meanwhile."""
        with self._clock.spending("wait"), self.timeline.span("wait for groups", "loop", step=self.counters.step):
            return self.flow.collect(self.config.learner.groups_per_update, self.should_stop)

    def _batch(self) -> list[Group]:
        """What was taken, one group for each prompt, with replayed samples."""
        for group in self.flow.taken:
            self.replay.add(group)
        rng = np.random.default_rng((self.config.seed, 4, self.counters.step))
        return [self.replay.mix(group, rng) for group in merge_by_prompt(self.flow.taken)]

    def _follow_up(self) -> None:
        """What is due after an update: a version, a checkpoint, an evaluation."""
        settings, evaluation_is_due = self.config.learner, self._evaluation_is_due()
        # An evaluation draws from the weights that it scores.
        if self._due(settings.publish_every) or (self.evaluation_draws and evaluation_is_due):
            self.publish()
        # An evaluation takes long, and may be cut off.
        if self._due(settings.checkpoint_every) or evaluation_is_due:
            self.checkpoint()
        if evaluation_is_due and self._stands():
            with self._clock.spending("settle"):
                self.flow.settle(self.should_stop)
            if self._stands():
                self._evaluate()

    def _stands(self) -> bool:
        """No stop was asked for, or only after the last update."""
        return self.counters.step == self.config.learner.steps or not self.should_stop()

    def _replayed(self, batch: list[Group]) -> float:
        """Share of a batch's samples that the buffer gave: with few in it, less than the config asks for."""
        total = sum(len(group) for group in batch)
        return 1 - sum(len(group) for group in self.flow.taken) / total

    def _keep(self, error: Exception) -> None:
        """A checkpoint before the run ends by `error`, which is what the run is to say of its end: not why there is none."""
        if self.lasting.is_lost or self.lasting.saved_step == self.counters.step or isinstance(error, CheckpointError):
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
                self.flow.feed()
                self.flow.receive(update)
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
        with self._clock.spending("pause"), self.timeline.span("evaluate", "loop", step=self.counters.step):
            self.lasting.ask(lambda: self.evaluate(self))

    def _evaluation_is_due(self) -> bool:
        return self._due(self.config.learner.evaluate_every or self.config.learner.steps)

    def _due(self, every: int) -> bool:
        return self.counters.step % every == 0 or self.counters.step == self.config.learner.steps

    def publish(self) -> None:
        """The learner's weights as a new version, which every request from now on names."""
        self.lasting.ask(self._publish)

    def _publish(self) -> None:
        # A number is used once, even if the learner dies over it: no version ever stands for two sets of weights.
        self.counters.version += 1
        with self.timeline.span("publish", "loop", version=self.counters.version):
            adapter = self.learner.adapter(self.counters.version)
            self.counters.published_step = self.counters.step
            self.flow.published()
            self.samplers.publish(adapter)

    def _account(self, metrics: dict[str, float]) -> None:
        """Ends a step: what was published and saved after the update before, the wait for groups, and the update."""
        seconds, counters, fresh = self._clock.lap(), self.counters, self.flow.use()
        staleness = [self.flow.staleness(group) for group in fresh]
        counters.step += 1
        counters.groups += len(fresh)
        counters.trajectories += sum(map(len, fresh))
        counters.sampled_tokens += sum(group.tokens for group in fresh)
        counters.seconds += seconds.whole
        counters.learner_busy_seconds += seconds.whole - seconds.idle
        metrics = {
            **metrics,
            **step_metrics.of_groups(fresh, staleness),
            **step_metrics.of_counters(counters),
            **step_metrics.of_seconds(seconds, fresh),
            "replay/size": float(len(self.replay)),
            "groups/in_flight": float(self.flow.in_flight),
            "groups/waiting": float(self.flow.waiting),
        }
        self.tracker.metrics(metrics, counters.step)
        self.on_step(self, metrics, fresh)

    def _learner_died(self, death: LearnerDied) -> None:
        self.counters.learner_deaths += 1
        logger.warning("the learner died at step %d and is started again: %s", self.counters.step, death)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def checkpoint(self, saved: np.ndarray | None = None) -> Path:
        """Everything that the rest of the run depends on. Groups issued and not used are noted by number alone. The learner is
        asked for its part unless that is given."""
        with self.timeline.span("checkpoint", "loop", step=self.counters.step):
            return self._write(self.lasting.ask(lambda: self.learner.save().result()) if saved is None else saved)

    def _write(self, saved: np.ndarray) -> Path:
        task = self.config.task.model_dump(mode="json")
        state = LoopState(self.counters, self.flow.unused(), self.replay.save(), task, saved)
        path = checkpoint.write(self.checkpoints, self.counters.step, state.files(), self.config.learner.keep_checkpoints)
        self.lasting.saved(self.counters.step)
        return path

    def restore(self, state: LoopState) -> None:
        """Takes the loop's part of a checkpoint; the learner's is the caller's to give it."""
        self.flow.restore(state.counters, state.unused_groups)
        self._new_task = not state.is_of(self.config.task)
        arrays, records = state.replay
        if not self._new_task:
            self.replay.restore(arrays, records)
        elif records:
            # Of other prompts, lengths or rewards: nothing in it is true of this task.
            logger.warning("the task is another than that of the checkpoint, whose replay buffer is left out")
        self.lasting.saved(self.counters.step)
