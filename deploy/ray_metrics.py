"""A run's figures among Ray's own metrics, where Prometheus collects them: on the metrics port of the driver's node.

They appear as ray_headwater_…, with the tag `run`, some seconds after they were set. MLflow has every step; these are for
dashboards and alerts over many runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

GAUGES = {
    "loss": ("loss", "Loss of the last update"),
    "log_z": ("log_z_nats", "Mean of log R / T - log q over the last update's samples, nats"),
    "spread": ("spread_nats2", "Its variance, nats squared"),
    "staleness": ("staleness_updates", "Mean age of the samples of the last update, updates"),
    "idle/learner": ("learner_idle_ratio", "Share of the last step in which the learner waited"),
    "rate/trajectories_per_second": ("trajectories_per_second", "Fresh trajectories of the last step by its duration"),
}
"""Metric of an update -> name and meaning at Ray."""
TAGS = ("run",)


class RayMetrics:
    """Ray has to be connected. `update` costs microseconds: Ray's own thread sends the values."""

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(f"headwater_{short}", text, TAGS) for name, (short, text) in GAUGES.items()}
        self._step = Gauge("headwater_step", "Updates done", TAGS)
        self._sampler_idle = Gauge("headwater_sampler_idle_ratio", "Share of a sampler's time without work", (*TAGS, "sampler"))
        self._trajectories = Counter("headwater_trajectories", "Trajectories used fresh by this job", TAGS)
        self._deaths = Counter("headwater_sampler_deaths", "Samplers of this job that died", TAGS)
        for metric in (*self._gauges.values(), self._step, self._sampler_idle, self._trajectories, self._deaths):
            metric.set_default_tags({"run": run})
        self._counted: dict[str, int] = {}

    def update(self, step: int, metrics: Mapping[str, float], *, trajectories: int, deaths: int) -> None:
        """After a step; `trajectories` and `deaths` are totals, of which a resumed run counts what is new."""
        self._step.set(step)
        for name, gauge in self._gauges.items():
            if math.isfinite(value := metrics[name]):
                gauge.set(value)
        for counter, name, total in ((self._trajectories, "trajectories", trajectories), (self._deaths, "deaths", deaths)):
            if (new := total - self._counted.get(name, 0)) > 0:
                counter.inc(new)
            self._counted[name] = total

    def resume(self, trajectories: int, deaths: int) -> None:
        """The totals that an earlier job of the run has counted already."""
        self._counted = {"trajectories": trajectories, "deaths": deaths}

    def sampler_idle(self, sampler: str, ratio: float) -> None:
        self._sampler_idle.set(ratio, {"sampler": sampler})
