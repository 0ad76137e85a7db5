"""Faults at random times in real runs of a tiny model: `python -m tests.chaos [FAULT …] [--injections 20] [--seed 0]`.

Each fault is one run with as many injections, over real Ray actors and real engines. A line of JSON says how long it
took until all samplers and the learner were at work again, how many updates were done again, how many groups were lost or
counted twice, and how many published versions had a number that was not above the one before: none, or the command fails.
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
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from deploy import ray_cluster
from deploy.pool import RaySamplers
from deploy.prepare import prepare
from deploy.ray_learner import RayLearner
from deploy.readiness import wait_until_ready
from learner.replay import Replay
from system.config import Config
from system.config_file import parse
from system.orchestrator import Orchestrator
from system.trajectory import Group
from tests import nodes, tiny
from tests.fakes import FakeTracker
from tests.loops import requests_of

STEPS_EACH = 60
"""Updates of a run for each injection."""
STEP_SECONDS = 0.1
"""Rest of the loop after each update, so that the run lasts while samplers start."""
CALM_SECONDS = 2.0
"""Longest time of a whole crew before the next injection."""
NODE_CPUS = 2
"""Of each node: two of them hold the crew, one alone does not."""
LOST_SECONDS = 120.0
"""A crew that is not whole again by then is lost: twice of what was seen on two busy cores."""
CHECKPOINT_EVERY = 5


class Learner(RayLearner):
    """Counts the updates that it is asked for, those that are done again among them."""

    def __init__(self, *arguments: Any) -> None:
        self.updates = 0
        self.repeated: list[int] = []
        """By each new learner: those since the checkpoint, until it hands out its weights. The one that the old learner died
        over is none of them."""
        self._repeats = False
        super().__init__(*arguments)

    def restart(self) -> None:
        self.repeated.append(0)
        self._repeats = True
        super().restart()

    def update(self, groups: Sequence[Group]) -> Future[dict[str, float]]:
        self.updates += 1
        if self._repeats:
            self.repeated[-1] += 1
        return super().update(groups)

    def adapter(self, version: int) -> Any:
        self._repeats = False
        return super().adapter(version)


class Buffer(Replay):
    """Knows how often each group was counted: those that are used fresh come here, and those that came back too old."""

    def __init__(self, *arguments: Any) -> None:
        self.counted: Counter[int] = Counter()
        super().__init__(*arguments)

    def add(self, group: Group) -> None:
        self.counted[group.group_id] += 1
        super().add(group)


class Pool(RaySamplers):
    """Keeps the numbers of the versions that were published to it."""

    def __init__(self, *arguments: Any) -> None:
        self.versions: list[int] = []
        super().__init__(*arguments)

    def publish(self, adapter: Any) -> None:
        published: Any = ray.get(adapter)
        self.versions.append(published.version)
        super().publish(adapter)


class Crew:
    """The run's samplers and learner, on a cluster whose nodes can be killed or on a local one. Whoever kills gets the process
    ids of those that must not come back."""

    def __init__(self, config: Config, problem: Any, cluster: Cluster | None) -> None:
        self.learner = Learner(config, problem)
        self.samplers = Pool(config, problem, lambda: self.learner.nodes)
        self.learner.room = self.samplers.room
        self.cluster = cluster
        wait_until_ready(self.learner, self.samplers)

    def kill_sampler(self, number: int) -> set[int]:
        return self._kill(random.choice(self.samplers.ready()), number)

    def kill_learner(self, number: int) -> set[int]:
        return self._kill(self._ask_learner(), number)

    def kill_node(self) -> set[int]:
        """That of a sampler or of the learner, with all that is on it. Another joins."""
        assert self.cluster
        actors = [*self.samplers.named().values(), *self.learner.named().values()]
        places: list[tuple[str, int]] = ray.get([actor.__ray_call__.remote(_place) for actor in actors])
        home, _ = random.choice(places)
        self.cluster.remove_node(next(n for n in self.cluster.worker_nodes if n.node_id == home), allow_graceful=False)
        self.cluster.add_node(num_cpus=NODE_CPUS)
        return {pid for node, pid in places if node == home}

    def is_whole_without(self, killed: set[int]) -> bool:
        """All are at work, in the places of the killed too."""
        pids = _answers([*self.samplers.ready(), self._ask_learner()])
        return len(pids) > self.samplers.config.actors.fewest and not pids & killed

    def learner_answers(self) -> bool:
        return bool(_answers([self._ask_learner()]))

    def _ask_learner(self) -> Any:
        """Reference to its process id."""
        return self.learner.actors[0].ready.remote()

    def _kill(self, asked: Any, number: int) -> set[int]:
        pid: int = ray.get(asked)
        os.kill(pid, number)
        return {pid}


def _place(actor: Any) -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _answers(references: list[Any]) -> set[Any]:
    """Those that come soon; none if an actor answers with its death."""
    done, _ = ray.wait(references, num_returns=len(references), timeout=0.5)
    try:
        return set(ray.get(done))
    except RayError:
        return set()


class Fault(NamedTuple):
    strike: Callable[[Crew], set[int]]
    needs_nodes: bool = False


FAULTS = {
    "sampler SIGKILL": Fault(lambda crew: crew.kill_sampler(signal.SIGKILL)),
    "sampler SIGSTOP": Fault(lambda crew: crew.kill_sampler(signal.SIGSTOP)),
    "learner SIGKILL": Fault(lambda crew: crew.kill_learner(signal.SIGKILL)),
    "learner SIGSTOP": Fault(lambda crew: crew.kill_learner(signal.SIGSTOP)),
    "node SIGKILL": Fault(Crew.kill_node, needs_nodes=True),
}


class Injector:
    """Waits a random time, strikes, and waits until the crew is whole again; `recoveries` has the seconds."""

    def __init__(self, crew: Crew, fault: Fault, injections: int) -> None:
        self.crew, self.fault, self.injections = crew, fault, injections
        self.recoveries: list[float] = []
        self.ended = False

    def run(self, training: Future[None]) -> None:
        try:
            for _ in range(self.injections):
                time.sleep(random.uniform(0, CALM_SECONDS))
                began = time.monotonic()
                killed = self.fault.strike(self.crew)
                while not self.crew.is_whole_without(killed):
                    if training.done() or time.monotonic() - began > LOST_SECONDS:
                        return
                    time.sleep(0.1)
                self.recoveries.append(time.monotonic() - began)
        finally:
            self.ended = True


@contextmanager
def _cluster(fault: Fault) -> Iterator[Cluster | None]:
    """A head for the driver, and two nodes for the crew; None where a local cluster will do."""
    if not fault.needs_nodes:
        yield None
        return
    with nodes.cluster(head_cpus=0) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=NODE_CPUS)
        yield cluster


def run(name: str, injections: int, folder: Path) -> dict[str, Any]:
    """One run under one fault, as a row of the table."""
    with _cluster(FAULTS[name]) as cluster:
        return {"fault": name} | _run(FAULTS[name], injections, folder, cluster)


def _run(fault: Fault, injections: int, folder: Path, cluster: Cluster | None) -> dict[str, Any]:
    steps = STEPS_EACH * injections
    config = parse(
        {
            "model": {"path": str(tiny.folder(folder))},
            "lora": {"rank": 4},
            "task": {"kind": "random_number", "high": 20},
            "sampler": {"samples_per_prompt": 8, "kv_cache_mb": 16},
            "actors": {"count": 2, "answer_seconds": 10},
            "learner": {
                "steps": steps,
                "warmup_steps": 0,
                "publish_every": 1,
                "max_staleness": 3,
                "checkpoint_every": CHECKPOINT_EVERY,
                "answer_seconds": 10,
            },
            "cluster": {"address": cluster and cluster.address},
            "output_dir": str(folder),
        }
    )
    problem = prepare(config).problem
    ray_cluster.connect(config)
    crew = Crew(config, problem, cluster)
    injector = Injector(crew, fault, injections)
    buffer = Buffer(config.replay)

    def on_step(loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
        time.sleep(STEP_SECONDS)
        # The loop does not run ahead of its injections. A learner that is gone is found by the loop alone, which has to go on.
        while loop.counters.step >= STEPS_EACH * (len(injector.recoveries) + 1) - 5 and not injector.ended:
            if not crew.learner_answers():
                break
            time.sleep(0.1)

    requests = requests_of(config, problem.prompts)
    loop = Orchestrator(
        config, requests, crew.samplers, crew.learner, buffer, FakeTracker(), folder / "checkpoints",
        on_step=on_step,
    )  # fmt: skip
    began = time.monotonic()
    with ThreadPoolExecutor() as threads:
        training = threads.submit(loop.train)
        try:
            injector.run(training)
            training.result()
        finally:
            crew.samplers.close()
            ray_cluster.disconnect()
    recoveries, versions = injector.recoveries, crew.samplers.versions
    return {
        "injections": len(recoveries),
        "recovery_seconds": round(statistics.median(recoveries), 1) if recoveries else None,
        "recovery_seconds_worst": round(max(recoveries), 1) if recoveries else None,
        # Groups are numbered without gaps.
        "groups_lost": len(set(range(loop.counters.next_group)) - buffer.counted.keys() - set(loop.flow.unused())),
        "groups_doubled": sum(count - 1 for count in buffer.counted.values()),
        "versions_not_new": sum(later <= earlier for earlier, later in pairwise(versions)),
        "deaths_seen": loop.counters.deaths + loop.counters.learner_deaths,
        "requests_reissued": loop.counters.reissued,
        "updates_repeated": crew.learner.updates - loop.counters.step,
        "updates_repeated_worst": max(crew.learner.repeated, default=0),
        "steps": loop.counters.step,
        "seconds": round(time.monotonic() - began, 1),
    }


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
        right = {"injections": arguments.injections, "groups_lost": 0, "groups_doubled": 0, "versions_not_new": 0}
        right["steps"] = STEPS_EACH * arguments.injections
        good &= right.items() <= row.items() and row["deaths_seen"] >= arguments.injections
        # After a learner's death at most those since the checkpoint, and in all the one that it died over besides.
        good &= row["updates_repeated_worst"] <= CHECKPOINT_EVERY
        good &= row["updates_repeated"] <= (CHECKPOINT_EVERY + 1) * arguments.injections
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
