"""What the actors say of themselves: where they are, memory, load, and what they did when. The loop waits for no answer."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import RayError

from system.process_metrics import system_metrics
from system.timeline import Span
from system.tracking import Tracker

logger = logging.getLogger(__name__)

SPANS = 10_000
"""Spans of all processes that a timeline holds; of a longer run it has the end, some thousand updates.
About 400 bytes each."""
EACH_SAMPLER = 8
"""Most samplers of which MLflow gets the statistics of each. Of more it gets their mean, least and greatest: of 64 samplers
each is a thousand metrics, and seventy million points in a week."""
LAST_SECONDS = 5.0
"""Longest wait for an actor's last spans."""


class Observed(Protocol):
    def named(self) -> dict[str, Any]:
        """Name -> Ray's handle of each actor that can answer (`deploy.ray_actors.BuiltActor`)."""
        ...


class Observer:
    def __init__(self, actors: Sequence[Observed], tracker: Tracker, seconds: float, folder: Path = Path()) -> None:
        """Asks `actors` every so many seconds, and gives `tracker` the statistics: of each by its name, or, of more than
        EACH_SAMPLER samplers, system/samplers/mean_NAME, min_NAME and max_NAME. The driver writes to `folder`."""
        self._folder = folder
        self._actors, self._tracker, self._seconds = actors, tracker, seconds
        self._pending: dict[tuple[str, str], Any] = {}
        self._asked = 0.0
        self._placed: dict[str, Any] = {}
        """Name -> the actor that was asked where it is. A new learner has the name of the one before."""
        self._told: dict[str, Mapping[str, float]] | None = None
        """Sampler -> its statistics since all were asked last, where they are told of together."""
        self._spans: deque[tuple[str, Span]] = deque(maxlen=SPANS)
        """With the process that each is of."""
        self.sampler_idle: dict[str, float] = {}
        """Sampler -> share of the time since its start in which it neither drew nor installed."""

    def look(self, step: int) -> None:
        """Asks if it is time, and takes what has come back."""
        if time.perf_counter() - self._asked > self._seconds:
            self._asked = time.perf_counter()
            self._tracker.system("driver", system_metrics(self._folder), step)
            if self._told:
                self._tracker.system("samplers", together(self._told.values()), step)
            self._ask()
        for (kind, name), reference in list(self._pending.items()):
            if not ray.wait([reference], timeout=0)[0]:
                continue
            del self._pending[kind, name]
            try:
                values: Any = ray.get(reference)
            # A dead actor has no statistics; its death is counted where its groups are.
            except RayError:
                if kind == "node":
                    del self._placed[name]
                continue
            if kind == "spans":
                self.keep(name, values)
                continue
            if kind == "node":
                self._tracker.tags({f"node.{name}": values})
                continue
            if self._told is not None and _is_sampler(name):
                self._told[name] = values
            else:
                self._tracker.system(name, values, step)
            if "busy" in values:
                self.sampler_idle[name] = 1.0 - values["busy"]

    def _ask(self) -> None:
        named = self._named()
        self._told = {} if sum(map(_is_sampler, named)) > EACH_SAMPLER else None
        # A sampler that died has a successor of another name.
        self.sampler_idle = {name: idle for name, idle in self.sampler_idle.items() if name in named}
        for name, actor in named.items():
            # What has not answered since the last time is not asked again. An actor hands out each span once.
            if ("stats", name) not in self._pending:
                self._pending["stats", name] = actor.stats.remote()
            if ("spans", name) not in self._pending:
                self._pending["spans", name] = actor.spans.remote()
            if self._placed.get(name) is not actor and ("node", name) not in self._pending:
                self._placed[name], self._pending["node", name] = actor, actor.node.remote()

    def _named(self) -> dict[str, Any]:
        return {name: actor for actors in self._actors for name, actor in actors.named().items()}

    def keep(self, name: str, spans: Sequence[Span]) -> None:
        self._spans.extend((name, span) for span in spans)

    def all_spans(self) -> Mapping[str, Sequence[Span]]:
        """Process -> what it did, the last that it did included."""
        handed_out = [(name, reference) for (kind, name), reference in self._pending.items() if kind == "spans"]
        left = [(name, actor.spans.remote()) for name, actor in self._named().items()]
        for name, reference in (*handed_out, *left):
            try:
                self.keep(name, ray.get(reference, timeout=LAST_SECONDS))
            # A dead or hanging actor leaves what it had sent before.
            except RayError as error:
                logger.warning("the timeline lacks the last spans of %s: %s", name, error)
        self._pending = {}
        by_process: dict[str, list[Span]] = {}
        for name, span in self._spans:
            by_process.setdefault(name, []).append(span)
        return by_process


def _is_sampler(name: str) -> bool:
    return name.startswith("sampler")


def together(each: Collection[Mapping[str, float]]) -> dict[str, float]:
    """mean_NAME, min_NAME and max_NAME over those who have a figure of that name; NaN is none."""
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for values in each for name in values):
        if known := [value for values in each if not math.isnan(value := values.get(name, math.nan))]:
            result |= {f"mean_{name}": float(np.mean(known)), f"min_{name}": min(known), f"max_{name}": max(known)}
    return result
