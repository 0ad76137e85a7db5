"""What a checkpoint has of a run: where the loop stands, its replay buffer, and the learner's weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from system import checkpoint
from system.checkpoint import CheckpointError
from system.task_config import Task, is_same

STATE, REPLAY, LEARNER = "state.json", "replay.safetensors", "learner.safetensors"


@dataclass
class Counters:
    """Where the run stands. A checkpoint has these, so that no group is skipped or counted twice."""

    step: int = 0
    """Updates done."""
    version: int = -1
    """Last adapter version that was published."""
    published_step: int = 0
    """Updates that it contains."""
    next_group: int = 0
    """Number of the next group that was never issued."""
    groups: int = 0
    """Groups used fresh."""
    too_stale: int = 0
    """Groups that came back staler than learner.max_staleness: used all the same, but for a policy gradient's."""
    trajectories: int = 0
    sampled_tokens: int = 0
    deaths: int = 0
    """Samplers that died while the loop ran, with work or without."""
    learner_deaths: int = 0
    reissued: int = 0
    """Groups that were issued again because their sampler was gone."""
    reward_faults: int = 0
    """Samples that were left out because their reward could not be had."""
    given_up: int = 0
    """Groups of which too few samples were left."""
    seconds: float = 0.0
    """Time in the loop, over all sessions of the run."""
    learner_busy_seconds: float = 0.0
    """Of those, all but the wait for groups and for evaluations to begin."""


@dataclass(frozen=True, eq=False)
class LoopState:
    """Everything that the rest of a run depends on."""

    counters: Counters
    unused_groups: list[int]
    """Numbers of the groups that were issued and not used. They are sampled again."""
    replay: tuple[dict[str, np.ndarray], list[dict[str, Any]]]
    """As the buffer's `save` has it."""
    task: dict[str, Any]
    """The config's section."""
    learner: np.ndarray
    """As the learner's `save` has it: uint8."""

    def files(self) -> dict[str, bytes]:
        """For `system.checkpoint`."""
        arrays, records = self.replay
        state = {"counters": vars(self.counters), "unused_groups": self.unused_groups, "replay": records, "task": self.task}
        return {
            LEARNER: self.learner.tobytes(),
            REPLAY: safetensors.numpy.save(arrays),
            STATE: json.dumps(state).encode(),
        }

    @classmethod
    def latest(cls, folder: Path, step: int | None = None) -> LoopState:
        """Of the last checkpoint in a folder, or that of `step`. Raises CheckpointError if there is none that is whole, or as
        `of` does."""
        return cls.of(checkpoint.read_latest(folder, step))

    @classmethod
    def of(cls, files: dict[str, bytes]) -> LoopState:
        """Raises CheckpointError where another version of the project wrote them, and the loop counted something else."""
        try:
            state = json.loads(files[STATE])
            replay = safetensors.numpy.load(files[REPLAY]), state["replay"]
            learner = np.frombuffer(files[LEARNER], np.uint8)
            return cls(Counters(**state["counters"]), state["unused_groups"], replay, state["task"], learner)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                "the checkpoint is of another version of Headwater, and only that version can go on from it: its "
                f"{STATE} is not what is read here: {error}"
            ) from error

    def is_of(self, task: Task) -> bool:
        """Its samples are of that task."""
        return is_same(task, self.task)
