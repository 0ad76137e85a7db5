"""Log-probs of the engine's draws against the learner's float32 re-scores, on the packaged model, a trajectory at a time.

    python -m tests.benchmarks.agreement float32|bfloat16

The engine draws continuations (allowed tokens, minimum length, forced stop) under an adapter that is far from the base.
In nats a token: |difference of the sums| / tokens of each trajectory, and what the canary measured.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from actors.settings import engine_environment
from tests.benchmarks.figures import Figure, report


def main(dtype: str) -> None:
    os.environ.update(engine_environment(os.cpu_count() or 1, gpu=False))
    from actors.build import build_sampler
    from learner.learner import Learner
    from system import config_file, tasks
    from system.language_model import load_tokenizer
    from system.models import locate
    from system.requests import Requests

    settings = [f"sampler.dtype={dtype}", "task.limit=4", "task.max_tokens=20", "sampler.canary_tolerance=1.0"]
    cfg = config_file.load("deploy/configs/continuation.yaml", settings)
    folder = locate(cfg.model)
    problem = tasks.build(cfg.task, load_tokenizer(folder))
    learner = Learner(cfg, folder, problem.constraints, cfg.model.path, problem.prompts[0].policy_tokens)
    rng = np.random.default_rng(0)
    tensors = learner.policy.adapter_tensors()
    moved = {name: array + rng.normal(0, 0.01, array.shape).astype(np.float32) for name, array in tensors.items()}
    learner.policy.load_adapter(moved)
    adapter = learner.adapter(1)
    sampler = build_sampler(cfg, problem)
    installed = sampler.install(adapter)
    requests = Requests(problem.prompts, 8, cfg.sampler.exploration, 0)
    groups = [sampler.sample(requests.evaluation(index, 16, 0), adapter) for index in range(len(problem.prompts))]
    differences, tokens = [], []
    for group, score in zip(groups, learner.score(groups), strict=True):
        for trajectory, log_q in zip(group.trajectories_K, score.log_q_K, strict=True):
            differences.append(abs(float(trajectory.logp_T.sum()) - log_q))
            tokens.append(len(trajectory) + 1)
    sampler.close()
    per_token = np.array(differences) / np.array(tokens)
    name = f"engine in {dtype} against the learner in float32, whole trajectories"
    bound = {"float32": 1e-3, "bfloat16": 0.06}[dtype]
    detail = {key: installed[key] for key in ("canary_error", "canary_signal")}
    report(Figure(name, "nats a token", per_token.tolist(), at_most=bound, detail={"worst": float(per_token.max())} | detail))


if __name__ == "__main__":
    main(sys.argv[1])
