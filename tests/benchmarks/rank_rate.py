"""Seconds of one update on one rank of the learner over those on two, a thread and a core each, in turns.

    python -m tests.benchmarks.rank_rate [--repeats 5]

Real Ray actors and the packaged model; the samples are random tokens, since what they say makes no difference to the time.
"""

from __future__ import annotations

import argparse

import numpy as np

from deploy import ray_cluster
from deploy.prepare import prepare
from deploy.ray_learner import RayLearner
from deploy.readiness import wait_until_ready
from system import config_file
from system.tasks.problem import Problem
from system.trajectory import Group, Prompt
from tests.benchmarks.figures import Figure, in_turns, ratio, report, seconds
from tests.benchmarks.update_rate import group_of

GROUPS, SAMPLES, PROMPT_TOKENS = 8, 8, 24


def groups_of(problem: Problem) -> list[Group]:
    """Groups of different prompts and sizes."""
    rng, result = np.random.default_rng(0), []
    constraints = problem.constraints
    tokens = constraints.columns[constraints.columns != constraints.stop_token]
    for number in range(GROUPS):
        prompt = Prompt(str(number), tuple(rng.choice(tokens, PROMPT_TOKENS).tolist()), (1,))
        lengths = rng.integers(max(1, constraints.min_tokens), constraints.max_tokens + 1, SAMPLES)
        result.append(group_of(prompt, [rng.choice(tokens, length).tolist() for length in lengths], rng))
    return result


def measure(repeats: int) -> Figure:
    """Raises AssertionError unless both learn the same."""
    changes = [f"learner.groups_per_update={GROUPS}", "actors.cpus=0", "cluster.local_cpus=3", "learner.lr=1e-4"]
    one, two = (config_file.load("deploy/configs/continuation.yaml", [*changes, f"learner.ranks={n}"]) for n in (1, 2))
    problem = prepare(one).problem
    ray_cluster.connect(two)
    try:
        alone, pair = RayLearner(one, problem), RayLearner(two, problem)
        wait_until_ready(alone, pair)
        groups = groups_of(problem)
        first = [learner.update(groups).result() for learner in (alone, pair)]
        np.testing.assert_allclose(first[1]["loss"], first[0]["loss"], rtol=1e-5)
        runs = {
            "one": seconds(lambda: alone.update(groups).result()),
            "two": seconds(lambda: pair.update(groups).result()),
        }
        times = in_turns(runs, repeats)
    finally:
        ray_cluster.disconnect()
    tokens = int(first[0]["tokens/forwarded"])
    return ratio("update on continuation, one rank over two", times["one"], times["two"], 1.6, groups=GROUPS, tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    report(measure(parser.parse_args().repeats))


if __name__ == "__main__":
    main()
