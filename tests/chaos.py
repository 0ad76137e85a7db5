"""Faults at random times in real runs of a tiny model: `python -m tests.chaos [FAULT …] [--injections 20] [--seed 0]`.

Each fault is one run with as many injections, over real Ray actors and real engines. A line of JSON says how long it
took until all samplers, or the learner, were at work again, and which groups were lost or counted twice: none, or the
command fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from deploy import ray_cluster
from deploy.pool import RaySamplers
from deploy.remote import RayLearner, wait_until_ready
from learner.replay import Replay
from system import tasks
from system.config import Config
from system.config_file import parse
from system.language_model import load_tokenizer
from system.models import locate
from system.orchestrator import Orchestrator
from system.requests import Requests
from system.trajectory import Group
from tests import tiny
from tests.fakes import FakeTracker

STEPS_EACH = 60
"""Updates of a run for each injection."""
STEP_SECONDS = 0.1
"""Rest of the loop after each update, so that the run lasts while samplers start."""
CALM_SECONDS = 2.0
"""Longest time of a whole crew before the next injection."""
LOST_SECONDS = 240.0
"""A crew that is not whole again by then is lost."""


class Crew:
    """The run's samplers and learner, and who of them is at work."""

    def __init__(self, config: Config, problem: Any) -> None:
        self.learner, self.samplers = RayLearner(config, problem), RaySamplers(config, problem)
        self.learner.room = self.samplers.room
        wait_until_ready(self.learner, self.samplers)
        self.names = self._built()
        self.learner_pid: int = ray.get(self._ask_learner())

    def _built(self) -> set[str]:
        return {member.name for member in self.samplers._built()}

    def _ask_learner(self) -> Any:
        """Reference to its process id."""
        return self.learner.actors[0].ready.remote()

    def kill_sampler(self, number: int) -> None:
        references = self.samplers.ready()
        os.kill(ray.get(references[random.randrange(len(references))]), number)

    def kill_learner(self, number: int) -> None:
        os.kill(self.learner_pid, number)

    def samplers_are_back(self) -> bool:
        """All are built, and one of them is new."""
        names = self._built()
        if len(names) < self.samplers.config.actors.fewest or names == self.names:
            return False
        self.names = names
        return True

    def learner_is_back(self) -> bool:
        done, _ = ray.wait([self._ask_learner()], timeout=0.5)
        try:
            pid = ray.get(done[0]) if done else self.learner_pid
        # The one that was killed answers with its death.
        except RayError:
            return False
        if pid == self.learner_pid:
            return False
        self.learner_pid = pid
        return True


Fault = tuple[Callable[[Crew], None], Callable[[Crew], bool]]
FAULTS: dict[str, Fault] = {
    "sampler SIGKILL": (lambda crew: crew.kill_sampler(signal.SIGKILL), Crew.samplers_are_back),
    "sampler SIGSTOP": (lambda crew: crew.kill_sampler(signal.SIGSTOP), Crew.samplers_are_back),
    "learner SIGKILL": (lambda crew: crew.kill_learner(signal.SIGKILL), Crew.learner_is_back),
    "learner SIGSTOP": (lambda crew: crew.kill_learner(signal.SIGSTOP), Crew.learner_is_back),
}


class Injector(threading.Thread):
    """Waits a random time, strikes, and waits until the crew is whole again; `recoveries` has the seconds."""

    def __init__(self, crew: Crew, fault: Fault, injections: int) -> None:
        super().__init__(daemon=True)
        self.crew, (self.strike, self.recovered), self.injections = crew, fault, injections
        self.recoveries: list[float] = []

    def run(self) -> None:
        for _ in range(self.injections):
            time.sleep(random.uniform(0, CALM_SECONDS))
            began = time.monotonic()
            self.strike(self.crew)
            while not self.recovered(self.crew):
                time.sleep(0.1)
                if time.monotonic() - began > LOST_SECONDS:
                    return
            self.recoveries.append(time.monotonic() - began)


def run(name: str, injections: int, folder: Path) -> dict[str, Any]:
    """One run under one fault, as a row of the table."""
    steps = STEPS_EACH * injections
    config = parse(
        {
            "model": {"path": str(tiny.folder(folder))},
            "lora": {"rank": 4},
            "task": {"kind": "random_number", "high": 20},
            "sampler": {"samples_per_prompt": 8, "kv_cache_mb": 16},
            "actors": {"count": 2, "answer_seconds": 10},
            "learner": {"steps": steps, "warmup_steps": 0, "max_staleness": 3, "checkpoint_every": 5, "answer_seconds": 10},
            "output_dir": str(folder),
        }
    )
    problem = tasks.build(config.task, load_tokenizer(locate(config.model)))
    ray_cluster.connect(config)
    crew = Crew(config, problem)
    injector = Injector(crew, FAULTS[name], injections)
    used: Counter[int] = Counter()

    def on_step(loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
        used.update(group.group_id for group in fresh)
        time.sleep(STEP_SECONDS)
        if loop.counters.step == 1:
            injector.start()
        # The learner is asked only by the loop, so its own injections cannot be waited for here.
        if loop.counters.step == steps - 5 and injector.recovered is not Crew.learner_is_back:
            injector.join()

    requests = Requests(problem.prompts, config.sampler.samples_per_prompt, config.sampler.exploration, config.seed)
    loop = Orchestrator(
        config, requests, crew.samplers, crew.learner, Replay(config.replay), FakeTracker(), folder / "checkpoints",
        on_step=on_step,
    )  # fmt: skip
    began = time.monotonic()
    try:
        loop.train()
    finally:
        crew.samplers.close()
        ray_cluster.disconnect()
    recoveries = injector.recoveries
    return {
        "fault": name,
        "injections": len(recoveries),
        "recovery_seconds": round(statistics.median(recoveries), 1) if recoveries else None,
        "recovery_seconds_worst": round(max(recoveries), 1) if recoveries else None,
        # Groups are numbered without gaps; those that came back too old to be used fresh went to the replay buffer.
        "groups_lost": len(set(range(loop.counters.next_group)) - used.keys() - _unused(loop)) - loop.counters.too_stale,
        "groups_doubled": sum(count - 1 for count in used.values()),
        "deaths_seen": loop.counters.deaths + loop.counters.learner_deaths,
        "requests_reissued": loop.counters.reissued,
        "steps": loop.counters.step,
        "seconds": round(time.monotonic() - began, 1),
    }


def _unused(loop: Orchestrator) -> set[int]:
    """Groups that were asked for and not used when the run ended."""
    waiting = [group.group_id for group in loop._arrived]
    return {*(issued.group_id for issued in loop._in_flight.values()), *waiting, *loop._reissue}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(map(repr, FAULTS))}; by default all")
    parser.add_argument("--injections", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    random.seed(arguments.seed)
    good = True
    for name in arguments.faults or FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            row = run(name, arguments.injections, Path(folder))
        print(json.dumps(row), flush=True)
        right = {"injections": arguments.injections, "groups_lost": 0, "groups_doubled": 0}
        right["steps"] = STEPS_EACH * arguments.injections
        good &= right.items() <= row.items()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
