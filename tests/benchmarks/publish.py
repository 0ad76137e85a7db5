"""Publishing: from the learner's call to a sample of every sampler under the new version, over real Ray actors.

    python -m tests.benchmarks.publish [key=value …]

Each round moves every LoRA weight by one update, publishes, and waits until all samplers have installed the version,
passed its canary and drawn a sample.
"""

from __future__ import annotations

import sys
import time

from deploy import ray_cluster
from deploy.pool import RaySamplers
from deploy.prepare import prepare
from deploy.ray_learner import RayLearner
from deploy.readiness import wait_until_ready
from system import config, config_file
from system.requests import evaluation_request
from tests import lora
from tests.benchmarks.figures import Figure, report
from tests.loops import requests_of

ROUNDS = 12


def measure(cfg: config.Config) -> list[Figure]:
    problem = prepare(cfg).problem
    ray_cluster.connect(cfg)
    learner, samplers = RayLearner(cfg, problem), RaySamplers(cfg, problem)
    wait_until_ready(learner, samplers)
    requests = requests_of(cfg, problem.prompts)
    samplers.publish(first := learner.adapter(0))
    one = evaluation_request(problem.prompts[0], 0, 1, seed=0, round_=0)
    lora.installed_by(samplers, first, one)
    seconds, installs, errors = [], [], []
    for version in range(1, ROUNDS + 1):
        learner.update([samplers.sample(requests.training(version)).result()]).result()
        started = time.perf_counter()
        samplers.publish(adapter := learner.adapter(version))
        stats = lora.installed_by(samplers, adapter, one)
        seconds.append(time.perf_counter() - started)
        installs += [each["last_install_seconds"] for each in stats]
        errors += [each["canary_error"] for each in stats]
        assert all(each["version"] == version for each in stats)
    samplers.close()
    ray_cluster.disconnect()
    count = cfg.actors.count
    return [
        Figure(f"publish to {count} samplers, until each has drawn a sample", "s", seconds, at_most=1.0),
        Figure(f"install of a version, {count} samplers at once", "s", installs, at_most=0.3),
        Figure("canary, engine against learner", "nats a token", errors, at_most=0.001),
    ]


if __name__ == "__main__":
    overrides = ["actors.count=2", "sampler.samples_per_prompt=8", *sys.argv[1:]]
    report(*measure(config_file.load("deploy/configs/random_number.yaml", overrides)))
