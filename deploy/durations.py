"""How long the parts of the loop take: from the timeline of a run."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system import config_file
from system.config import ConfigError

DRIVER_SECONDS, DRIVER_UPDATE_SECONDS = 0.004, 0.006
"""For a group of 20, and for an update once more, of which MLflow is told: as tests/benchmarks/driver_rate.py measures it over
Ray, with one group an update and with eight."""


@dataclass(frozen=True)
class Durations:
    """Seconds of work."""

    update: float
    adapter: float
    """Of the learner, for a version."""
    install: float
    group: float
    """Of an engine, for a group."""
    reward: float
    driver: float = DRIVER_SECONDS + DRIVER_UPDATE_SECONDS
    """Of the loop itself, for a group, its share of an update's included."""

    @classmethod
    def of_run(cls, run_dir: Path) -> Durations:
        """Of a run that has ended.

        Raises:
            ConfigError: it has no timeline, or was too short to have all kinds of work.
        """
        path = run_dir / "timeline.json"
        if not path.is_file():
            raise ConfigError(f"{run_dir} has no {path.name}; a run writes it when it ends")
        config = config_file.load(run_dir / "config.yaml", [])
        one_thread = config.actors.threads == config.learner.thread_count == 1
        one_thread = one_thread and not (config.actors.gpus or config.learner.gpus)
        return cls.of_trace(json.loads(path.read_text(encoding="utf-8")), one_thread)

    @classmethod
    def of_trace(cls, trace: dict[str, Any], one_thread: bool) -> Durations:
        """From a run's timeline; medians, and for the engines means, since groups share them. Groups of evaluations, which have
        another size, are left out.

        Raises:
            ConfigError: the run was too short to have all kinds of work.
        """
        spans: dict[str, list[float]] = {}
        skipped: set[tuple[int, str]] = set()
        work = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        evaluations = [(event["ts"], event["ts"] + event["dur"]) for event in work if event["name"] == "evaluate"]
        for event in work:
            if event["cat"] == "loop":
                continue
            # An engine draws for no group alone, so that only the time tells whom it draws for.
            if event["name"] == "generate" and any(start <= event["ts"] < end for start, end in evaluations):
                continue
            if event["name"] == "reward" and event["args"]["group"] < 0:
                continue
            # The first of each kind warms up.
            if (event["pid"], event["name"]) not in skipped:
                skipped.add((event["pid"], event["name"]))
                if event["name"] not in ("generate", "reward"):
                    continue
            seconds = event["tdur"] if one_thread else event["dur"]
            spans.setdefault(event["name"], []).append(seconds / 1e6)
        missing = {"update", "adapter", "install", "generate", "reward"} - spans.keys()
        if missing:
            raise ConfigError(f"the run's timeline has too few spans of {', '.join(sorted(missing))}; take a longer run")
        return cls(
            update=statistics.median(spans["update"]),
            adapter=statistics.median(spans["adapter"]),
            install=statistics.median(spans["install"]),
            group=sum(spans["generate"]) / len(spans["reward"]),
            reward=statistics.median(spans["reward"]),
        )
