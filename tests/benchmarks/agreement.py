"""Log-probs of the engine's draws against the learner's float32 re-scores, on the packaged model, a trajectory at a time.

    python -m tests.benchmarks.agreement float32|bfloat16 [--run RUN]

The engine draws (allowed tokens, minimum length, forced stop) under an adapter that is far from the base: continuations under
noise, or those of a finished run under what it learned. In nats a token: |difference of the sums| / tokens of each trajectory,
and what the canary measured. For bfloat16 also the learner's own scores in it against those in float32.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from actors.settings import engine_environment
from tests.benchmarks.figures import Figure, report
from tests.benchmarks.runs import ALL_LAYERS, ROOT

BOUND = {"float32": 1e-3, "bfloat16": 0.06}


def main(dtype: str, run: Path | None) -> None:
    os.environ.update(engine_environment(os.cpu_count() or 1, gpu=False))
    from actors.build import build_sampler
    from deploy.runs import adapter_file, load_adapter
    from learner.learner import Learner
    from system import config_file, tasks
    from system.config import Config
    from system.models import locate
    from system.pretrained import load_tokenizer
    from system.requests import evaluation_request

    settings = [f"sampler.dtype={dtype}", "task.limit=4", "sampler.canary_tolerance=100", "learner.dtype=float32"]
    file = run / "config.yaml" if run else ROOT / "deploy/configs/continuation.yaml"
    cfg = config_file.load(file, settings if run else [*settings, "task.max_tokens=20", *ALL_LAYERS])
    folder = locate(cfg.model)
    problem = tasks.build(cfg.task, load_tokenizer(folder))

    def built(config: Config) -> Learner:
        learner = Learner.build(config, problem)
        if run:
            load_adapter(learner.policy, adapter_file(run), config.model.path, config.lora)
            return learner
        rng = np.random.default_rng(0)
        tensors = learner.policy.adapter_tensors()
        moved = {name: array + rng.normal(0, 0.01, array.shape).astype(np.float32) for name, array in tensors.items()}
        learner.policy.load_adapter(moved)
        return learner

    learner = built(cfg)
    adapter = learner.adapter(1)
    sampler = build_sampler(cfg, problem)
    requests = [evaluation_request(prompt, at, 16, seed=0, round_=0) for at, prompt in enumerate(problem.prompts)]
    groups = [sampler.sample(request, adapter) for request in requests]
    stats = sampler.stats()
    sampler.close()

    def log_q(learner: Learner) -> np.ndarray:
        return np.concatenate([score.log_q_K for score in learner.score(groups)])

    trajectories = [trajectory for group in groups for trajectory in group.trajectories_K]
    tokens = np.array([len(trajectory) + 1 for trajectory in trajectories])
    drawn = np.array([float(trajectory.logp_T.sum()) for trajectory in trajectories])
    exact = log_q(learner)
    compared = {"engine": drawn}
    if dtype != "float32":
        compared["learner"] = log_q(built(cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"dtype": dtype})})))
    for name, values in compared.items():
        per_token = np.abs(values - exact) / tokens
        detail = {"worst": float(per_token.max()), "worst of a trajectory": float(np.abs(values - exact).max())}
        if name == "engine":
            detail |= {key: stats[key] for key in ("canary_error", "canary_signal")}
        what = f"{name} in {dtype} against the learner in float32, whole trajectories"
        report(Figure(what, "nats a token", per_token.tolist(), at_most=BOUND[dtype], detail=detail))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", choices=tuple(BOUND))
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    arguments = parser.parse_args()
    main(arguments.dtype, arguments.run)
