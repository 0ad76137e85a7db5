"""Where the seconds of a step go: waiting for groups, waiting for an evaluation to begin, and the rest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StepSeconds:
    whole: float
    wait: float
    """For groups."""
    settle: float
    """For what is in flight, before an evaluation."""

    @property
    def idle(self) -> float:
        """In which the learner had nothing to do."""
        return self.wait + self.settle


class StepClock:
    """Steps follow one another without a gap, but for pauses, which are no part of any."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def spending(self, on: Literal["wait", "settle", "pause"]) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._spent[on] += time.perf_counter() - started

    def lap(self) -> StepSeconds:
        """Ends a step and begins the next."""
        now, spent = time.perf_counter(), self._spent
        step = StepSeconds(now - self._began - spent["pause"], spent["wait"], spent["settle"])
        self._began, self._spent = now, defaultdict(float)
        return step
