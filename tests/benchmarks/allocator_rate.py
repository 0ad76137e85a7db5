"""Seconds of an update of `continuation` under glibc's own ways over those that a learner on CPUs begins with, in turns.

    python -m tests.benchmarks.allocator_rate [--dtype bfloat16] [--threads 1] [--repeats 10]

Each in a process of its own: the allocator reads its settings when a process begins. Beside the ratio, the page faults of an
update, and the most memory that each process had.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Mapping
from contextlib import ExitStack
from statistics import median

import numpy as np

from deploy.allocator import KEEPS_MEMORY, ONE_ARENA
from tests.benchmarks.figures import Figure, in_turns, ratio, report
from tests.benchmarks.worker import Worker

UPDATES = 6
"""Of two groups that take turns."""


class Updates:
    def __init__(self, dtype: str, threads: int) -> None:
        import torch

        from learner.learner import Learner
        from system import config_file, tasks
        from system.models import locate
        from system.pretrained import load_tokenizer
        from tests.benchmarks.update_rate import sentences

        torch.set_num_threads(threads)
        cfg = config_file.load("deploy/configs/continuation.yaml", [f"learner.dtype={dtype}"])
        folder = locate(cfg.model)
        problem = tasks.build(cfg.task, load_tokenizer(folder))
        self.learner = Learner(cfg, folder, problem.constraints, cfg.model.path, problem.prompts[0].policy_tokens)
        self.groups = [sentences(self.learner, problem, samples, np.random.default_rng(samples)) for samples in (20, 33)]

    def measure(self) -> tuple[float, float, float]:
        """(seconds, page faults) of an update, and the most memory so far, MiB."""
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for number in range(UPDATES):
            self.learner.update([self.groups[number % len(self.groups)]])
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        return seconds / UPDATES, (after.ru_minflt - before.ru_minflt) / UPDATES, after.ru_maxrss / 1024


def begun(environment: Mapping[str, str], dtype: str, threads: int) -> Worker:
    kept = os.environ.copy()
    os.environ.update(environment)
    worker = Worker(Updates, dtype, threads)
    worker("measure")
    os.environ.clear()
    os.environ.update(kept)
    return worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    ways = {"one arena": ONE_ARENA, "keeps memory": ONE_ARENA | KEEPS_MEMORY}
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}

    def seconds(name: str) -> float:
        seen[name].append(workers[name]("measure"))
        return seen[name][-1][0]

    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(begun(environment, arguments.dtype, arguments.threads))
            for name, environment in ways.items()
        }
        times = in_turns({name: lambda name=name: seconds(name) for name in ways}, arguments.repeats)
    name = f"update of continuation, {arguments.dtype}"
    plain, kept = times.values()
    report(ratio(f"{name}, one arena alone over memory that is kept", plain, kept, None, threads=arguments.threads))
    for way, found in seen.items():
        _, faults, memory = zip(*found, strict=True)
        report(Figure(f"{name}, {way}: page faults", "", faults, detail={"MiB at most": round(median(memory))}))


if __name__ == "__main__":
    main()
