"""A learner that may die: it is made again, and then knows as much as it did.

The loop itself stays where it is meanwhile: nothing is sampled, logged or counted again, and no group is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from system.handles import LearnerDied, LearnerHandle
from system.loop_state import LoopState
from system.run_error import RunError
from system.timeline import Timeline
from system.trajectory import Group

T = TypeVar("T")


@dataclass
class LastingLearner:
    """A new learner begins with the last checkpoint, and does the updates since once more, on the batches that they had."""

    handle: LearnerHandle
    checkpoints: Path
    max_deaths: int
    """In a row, with no checkpoint in between."""
    timeline: Timeline
    on_death: Callable[[LearnerDied], None]
    on_revival: Callable[[], None]
    """May ask the learner: if that dies over it, it is made again once more."""
    saved_step: int | None = field(default=None, init=False)
    """Of the last checkpoint; None: a new learner begins with the weights of the run's start."""
    is_lost: bool = field(default=False, init=False)
    _since_saved: list[list[Group]] = field(default_factory=list, init=False)
    """The batches of the updates since the last checkpoint."""
    _deaths_in_a_row: int = field(default=0, init=False)

    def ask(self, call: Callable[[], T]) -> T:
        """What `call` returns, which is made again where the learner dies over it. Raises RunError after too many deaths."""
        died = False
        while True:
            try:
                if died:
                    self._revive()
                return call()
            except LearnerDied as death:
                died = self.is_lost = True
                self._mourn(death)

    def updated(self, batch: list[Group]) -> None:
        """An update is done and counted."""
        self._since_saved.append(batch)

    def saved(self, step: int) -> None:
        """A checkpoint has the learner as it is after `step` updates."""
        self.saved_step, self._since_saved, self._deaths_in_a_row = step, [], 0

    def _mourn(self, death: LearnerDied) -> None:
        self.on_death(death)
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > self.max_deaths:
            raise RunError(
                f"the learner died {self._deaths_in_a_row} times with no checkpoint in between (actors.max_deaths="
                f"{self.max_deaths}); the last cause: {death}"
            ) from death

    def _revive(self) -> None:
        with self.timeline.span("revive the learner", "loop"):
            self.handle.restart()
            if self.saved_step is not None:
                self.handle.restore(LoopState.latest(self.checkpoints, self.saved_step).learner, self.saved_step)
            for batch in self._since_saved:
                self.handle.update(batch).result()
            self.is_lost = False
            self.on_revival()
