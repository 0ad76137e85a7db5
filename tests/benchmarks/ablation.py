"""Settings of the loop, from the loss to the engine, by their time to the posterior, several seeds each.

    python -m tests.benchmarks.ablation random_number [--seeds 0,1,2] [--steps 40] [--only loss]
    python -m tests.benchmarks.ablation continuation  [--seeds 0,1,2] [--steps 60] [--only loss]

Seconds of training until the target is reached, and updates, which other work on the machine hardly changes; where it is not,
all there were, so that both are lower bounds.
`random_number`: exact KL at most 0.05. `continuation` (six prompts, up to 12 tokens): the variance of log R / T - log q,
mean over prompts, at most a tenth of the base model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.figures import Figure, report
from tests.benchmarks.original_recipe import TARGET
from tests.benchmarks.runs import ALL_LAYERS, NO_REPLAY, ON_POLICY, ROOT, job

SETTINGS: dict[str, list[str]] = {
    "loss pooled (default)": [],
    "loss vargrad": ["loss.kind=vargrad"],
    "loss subtb": ["loss.kind=subtb"],
    "loss tb": ["loss.kind=tb"],
    "loss db": ["loss.kind=db"],
    "exploration none": ON_POLICY,
    "exploration by temperature alone": ["sampler.exploration.epsilon=0"],
    "exploration by temperature and epsilon": ["sampler.exploration.epsilon=0.3"],
    "exploration none, no replay": ON_POLICY + NO_REPLAY,
    "no replay": NO_REPLAY,
    "staleness 0": ["learner.publish_every=1", "learner.max_staleness=0"],
    "staleness 2, a version every 2 updates": ["learner.publish_every=2", "learner.max_staleness=2"],
    "staleness 4, a version every 4 updates": ["learner.publish_every=4", "learner.max_staleness=4"],
    "staleness 8, a version every 8 updates": ["learner.publish_every=8", "learner.max_staleness=8"],
    "staleness 10, a version every 8 updates": ["learner.publish_every=8", "learner.max_staleness=10"],
    "drained, a version waits for what is drawn": ["sampler.drain=true"],
    "learning rate 2e-3": ["learner.lr=2e-3"],
    "learning rate 2e-3, warm-up 2": ["learner.lr=2e-3", "learner.warmup_steps=2"],
    "learning rate 4e-3": ["learner.lr=4e-3"],
    "layers, all": ALL_LAYERS,
    "layers, two thirds": ["lora.layers=0.66"],
    "layers, half": ["lora.layers=0.5"],
    "layers, a third": ["lora.layers=0.33"],
    "layers, a fifth": ["lora.layers=0.2"],
    "layers, a tenth": ["lora.layers=0.1"],
    "engine, bfloat16, merged with stochastic rounding": ["sampler.dtype=bfloat16"],
    "engine, bfloat16, merged to the nearest": ["sampler.dtype=bfloat16", "sampler.rounding=nearest"],
    "engine, float32, adapter beside the base": ["sampler.install=adapter"],
    "placement, two threads for the learner": ["learner.threads=2"],
    "placement, two threads for the sampler": ["actors.cpus=2"],
    "placement, two threads for each": ["learner.threads=2", "actors.cpus=2"],
}


@dataclass(frozen=True)
class Task:
    metric: str
    every: int
    """Updates between two evaluations. Where these draw, a version is made for each: it is no other than there is anyway."""
    steps: int
    overrides: tuple[str, ...] = ()
    target: float | None = None
    """Largest value of the metric; by default a tenth of what it is at first."""


TASKS = {
    "random_number": Task("exact/kl_target_q", every=3, steps=40, target=TARGET),
    "continuation": Task(
        "posterior/spread",
        every=8,
        steps=60,
        overrides=(
            "task.limit=6",
            "task.max_tokens=12",
            "learner.evaluation_samples=16",
            "learner.warmup_steps=5",
            "learner.reward_temperature.horizon=20",
        ),
    ),
}


def measure(name: str, task: Task, setting: str, overrides: list[str], seeds: list[str], steps: int) -> Figure:
    times: list[float] = []
    updates: list[int] = []
    ends: list[dict[str, Any]] = []
    for seed in seeds:
        settings = [f"seed={seed}", f"learner.evaluate_every={task.every}", f"learner.steps={steps}", *task.overrides]
        run = job(str(ROOT / f"deploy/configs/{name}.yaml"), *settings, *overrides)
        target = task.target or run.evaluations[0][task.metric] / 10
        reached = [metrics for metrics in run.evaluations if metrics[task.metric] <= target]
        first = min(reached, default=run.evaluations[-1], key=lambda metrics: metrics["step"])
        times.append(first["seconds_training"])
        updates.append(int(first["step"]))
        ends.append(run.summary["after"] | {"rate": run.summary["trajectories_per_second"], "reached": bool(reached)})
        end = f"{task.metric} {ends[-1][task.metric]:.4g}"
        print(f"{name}, {setting}, seed {seed}: {times[-1]:.1f} s, {updates[-1]} updates, {end}", file=sys.stderr)
    detail = {
        "updates": json.dumps(updates),
        "reached": json.dumps([end["reached"] for end in ends]),
        "at the end": json.dumps([round(end[task.metric], 5) for end in ends]),
        "trajectories_per_second": round(statistics.median(end["rate"] for end in ends), 2),
    }
    what = f"{task.metric} {task.target or '/ 10'}"
    return Figure(f"time to {what} on {name}, {setting}", "s", times, detail=detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", default="", help="settings whose name starts so")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    for setting, overrides in SETTINGS.items():
        if setting.startswith(arguments.only):
            seeds = arguments.seeds.split(",")
            report(measure(arguments.task, task, setting, overrides, seeds, arguments.steps or task.steps))


if __name__ == "__main__":
    main()
