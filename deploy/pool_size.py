"""How many samplers a run should have: another while the learner waits for them, one less when there is not work for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

IDLE_LEARNER = 0.1
"""A learner that waits for more than this share of a step could use another sampler."""
SPARE_STEPS = 20
"""Steps without work for all, after which a sampler goes: starting one again takes as long as many steps."""


@dataclass
class PoolSize:
    """Begins with the fewest."""

    fewest: int
    most: int
    target: int = field(init=False)
    _most_asked: int = field(default=0, init=False)
    """Groups of the training that were under way or waited at one time, at most, since the last step."""
    _spare_steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.target = self.fewest

    def asked(self, groups: int) -> None:
        """So many groups of the training are under way or wait."""
        self._most_asked = max(self._most_asked, groups)

    def after_step(self, learner_idle: float, *, built: int, one_rests: bool, has_room: Callable[[], bool]) -> int:
        """The change of the target, 1, 0 or -1, which it has then. `learner_idle` is the share of the step that the learner
        waited for groups; so many samplers are `built`."""
        most_asked, self._most_asked = self._most_asked, 0
        self._spare_steps = self._spare_steps + 1 if most_asked < self.target else 0
        change = 0
        if built != self.target:
            return change
        if learner_idle >= IDLE_LEARNER and most_asked > self.target:
            change = int(self.target < self.most and has_room())
        elif self._spare_steps >= SPARE_STEPS and self.target > self.fewest and one_rests:
            change, self._spare_steps = -1, 0
        self.target += change
        return change

    def give_up(self) -> bool:
        """One that was started cannot be had. False if the run is to have as many; else it is no longer wanted, until the
        learner waits again."""
        spare = self.target > self.fewest
        self.target -= spare
        return spare
