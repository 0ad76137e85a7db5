"""What a frozen model's reasons say about a label: `subjectivity`'s likelihood p(label | X Z), before any training.

    python -m tests.benchmarks.reasons --data FOLDER [--texts 100] [--samples 8] [--run RUN] [key=value …]

For the first texts of `subj/train.jsonl`, none of which is in the small training sets, the odds of the labels under the frozen
model: `alone` after the text, `reasons` after the text and each of K sampled reasons, a mean of probabilities, and `one reason`
for single ones. `--run` draws the reasons from a run's adapter instead of the base model. Area under the ROC curve: the chance
that a text of the second label has higher odds for it than one of the first, which no offset between labels can change; and
the accuracy where the odds are split at their median, the best that an offset found without labels can do.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np

from actors.settings import engine_environment
from deploy.machine import alone
from system import config_file
from system.config import Config
from system.task_config import Subjectivity
from system.trajectory import Group
from tests.benchmarks.runs import ROOT


def area(odds_N: np.ndarray, second_N: np.ndarray) -> float:
    """Of the ROC curve: P(odds of a text of the second label > odds of one of the first), ties counting half."""
    differences = odds_N[second_N][:, None] - odds_N[~second_N][None]
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def balanced(odds_N: np.ndarray, second_N: np.ndarray) -> float:
    """Accuracy of a split at the median."""
    return float(np.mean((odds_N > np.median(odds_N)) == second_N))


def task_of(config: Config) -> Subjectivity:
    assert isinstance(config.task, Subjectivity)
    return config.task


def alone_odds(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [N] log-odds of the second label after the text alone, nats; bool [N] that label is right)."""
    from deploy.prepare import prepare
    from learner.learner import Learner

    task = task_of(config)
    config = config.model_copy(update={"task": task.model_copy(update={"stage": "label"})})
    problem = prepare(config).problem
    unknown = tuple(np.zeros(len(choice) + 1) for choice in problem.choices)
    groups = [Group(prompt, problem.choices, unknown, 0, 0) for prompt in problem.prompts]
    odds_N = np.array([score.log_q_K[1] - score.log_q_K[0] for score in Learner.build(config, problem).score(groups)])
    return odds_N, np.array([prompt.meta["label"] == task.labels[1] for prompt in problem.prompts])


def reasoned_odds(config: Config, run: Path | None, samples: int) -> np.ndarray:
    """float64 [N, K]: log-odds of the second label after the text and each of K reasons, nats."""
    from deploy.local import opened
    from deploy.runs import adapter_file
    from system.evaluation import log_reward_EK
    from system.requests import evaluation_request

    second = task_of(config).labels[1]

    def odds(group: Group) -> np.ndarray:
        other_K, own_K = log_reward_EK(group, local.problem.alternatives[group.prompt.id], local)
        return own_K - other_K if group.prompt.meta["label"] == second else other_K - own_K

    with opened(config, samples) as local:
        if run:
            local.use(adapter_file(run))
        groups = [
            local.sample(evaluation_request(prompt, at, samples, seed=config.seed, round_=0))
            for at, prompt in enumerate(local.problem.prompts)
        ]
        return np.array([odds(group.result()) for group in groups])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_intermixed_args()
    records = (f"task.records={arguments.data / 'subj/train.jsonl'}", f"task.limit={arguments.texts}")
    file = arguments.run / "config.yaml" if arguments.run else ROOT / "deploy/configs/subjectivity.yaml"
    config = alone(config_file.load(file, [*records, *arguments.overrides]))
    os.environ.update(engine_environment(config.actors.threads, gpu=False))
    odds_NK = reasoned_odds(config, arguments.run, arguments.samples)
    alone_N, second_N = alone_odds(config)
    found = {"alone": alone_N, "reasons": np.mean(1 / (1 + np.exp(-odds_NK)), axis=1)}
    for name, odds_N in found.items():
        print(json.dumps({"odds": name, "area": area(odds_N, second_N), "balanced": balanced(odds_N, second_N)}))
    one = [(area(odds_N, second_N), balanced(odds_N, second_N)) for odds_N in odds_NK.T]
    print(json.dumps({"odds": "one reason", **dict(zip(("area", "balanced"), np.mean(one, axis=0).tolist(), strict=True))}))
    print(
        json.dumps({"second label preferred": float(np.mean(odds_NK > 0)), "spread over reasons": float(odds_NK.std(1).mean())})
    )


if __name__ == "__main__":
    main()
