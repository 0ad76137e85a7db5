"""Where the seconds of a step go: waiting for groups, waiting for an evaluation to begin, and the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


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


@dataclass
class StepClock:
    """Steps follow one another without a gap, but for what is `paused`."""

    _began: float = field(default_factory=time.perf_counter)
    _wait: float = 0.0
    _settle: float = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._wait += time.perf_counter() - started

    @contextmanager
    def settling(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._settle += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """This is no part of a step."""
        started = time.perf_counter()
        yield
        self._began += time.perf_counter() - started

    def lap(self) -> StepSeconds:
        """Ends a step and begins the next."""
        now = time.perf_counter()
        step = StepSeconds(now - self._began, self._wait, self._settle)
        self._began, self._wait, self._settle = now, 0.0, 0.0
        return step
