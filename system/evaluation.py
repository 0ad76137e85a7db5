"""How good the current policy is: by exact enumeration where outcomes can be listed, else from on-policy samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from system.orchestrator import SamplerDied, Samplers
from system.posterior import Bounds, Exact, mean_metrics
from system.requests import Requests
from system.tasks.problem import Problem
from system.trajectory import Group

ATTEMPTS = 3
"""How often the samples of a prompt are asked for before a lost sampler fails the evaluation."""


class Scorer(Protocol):
    def score(self, groups: Sequence[Group]) -> Future[list[Any]]:
        """Per group a learner's Score: log_q_K, log_q_stop_K, log_reward_K."""
        ...


@dataclass(frozen=True, eq=False)
class Evaluation:
    metrics: dict[str, float]
    per_prompt: list[dict[str, Any]] = field(default_factory=list)
    """One row a prompt: its bounds."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """One row a sample: prompt, tokens, log R, log q."""
    log_q_O: np.ndarray | None = None
    """log q of the listed outcomes of the first prompt."""


def exact(problem: Problem, scorer: Scorer) -> Evaluation:
    """q against the target over all listed outcomes, from log-probs and not from samples. Means over prompts."""
    assert problem.outcomes is not None and problem.log_target_O is not None
    unknown = tuple(np.zeros(len(outcome) + 1) for outcome in problem.outcomes)
    groups = [Group(prompt, problem.outcomes, unknown, 0, 0) for prompt in problem.prompts]
    scores = scorer.score(groups).result()
    results = [Exact.of(score.log_q_K, problem.log_target_O).metrics() for score in scores]
    metrics = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    rows = [{"prompt": p.id, **result} for p, result in zip(problem.prompts, results, strict=True)]
    return Evaluation(metrics, rows, log_q_O=scores[0].log_q_K)


Judge = Callable[[Group], dict[str, float]]


def judge(problem: Problem, decode: Callable[[Sequence[int]], str]) -> Judge:
    """The task's own verdict on a group, from its texts; no metrics where the task has none."""

    def verdict(group: Group) -> dict[str, float]:
        if problem.judge is None:
            return {}
        return problem.judge(group.prompt, [decode(t.tokens_T.tolist()) for t in group.trajectories_K])

    return verdict


def sampled(
    requests: Requests,
    samplers: Samplers,
    scorer: Scorer,
    *,
    samples: int,
    temperature: float,
    round_: int,
    judge: Judge = lambda group: {},
) -> Evaluation:
    """Bounds on log Z, ESS and spread from `samples` on-policy draws of each prompt, at reward temperature `temperature`.

    `judge` adds what it says of each prompt's group to its row, and the means to the metrics, as task/… (a prompt
    without a metric takes no part in its mean).

    Raises:
        SamplerDied: the samplers that a prompt was given to died ATTEMPTS times.
    """
    groups = _draw(requests, samplers, samples, round_)
    scores = scorer.score(groups).result()
    bounds_G, per_prompt, table = [], [], []
    for group, score in zip(groups, scores, strict=True):
        bounds = Bounds.of(score.log_reward_K / temperature - score.log_q_K)
        bounds_G.append(bounds)
        lengths = [len(trajectory) for trajectory in group.trajectories_K]
        row = {name: getattr(bounds, name) for name in Bounds.__dataclass_fields__}
        verdict = {f"task/{name}": value for name, value in judge(group).items()}
        per_prompt.append({"prompt": group.prompt.id, **row, "length": float(np.mean(lengths)), **verdict})
        for trajectory, log_q, log_reward in zip(group.trajectories_K, score.log_q_K, score.log_reward_K, strict=True):
            tokens = trajectory.tokens_T.tolist()
            table.append({"prompt": group.prompt.id, "tokens": tokens, "log_q": float(log_q), "log_reward": float(log_reward)})
    metrics = mean_metrics(bounds_G)
    metrics["posterior/log_q_stop"] = float(np.mean([score.log_q_stop_K.mean() for score in scores]))
    metrics["posterior/length"] = float(np.mean([row["length"] for row in per_prompt]))
    metrics |= means(per_prompt)
    return Evaluation(metrics, per_prompt, table)


def means(per_prompt: Sequence[Mapping[str, Any]], prefix: str | tuple[str, ...] = "task/") -> dict[str, float]:
    """Means of the metrics of that prefix over the prompts that have them: a missing one or NaN is no verdict."""
    names = dict.fromkeys(name for row in per_prompt for name in row if name.startswith(prefix))
    values = {name: [row[name] for row in per_prompt if not math.isnan(row.get(name, math.nan))] for name in names}
    return {name: float(np.mean(known)) for name, known in values.items() if known}


def _draw(requests: Requests, samplers: Samplers, samples: int, round_: int) -> list[Group]:
    def ask(index: int) -> Future[Group]:
        return samplers.sample(requests.evaluation(index, samples, round_))

    futures = [ask(index) for index in range(len(requests.prompts))]
    groups = []
    for index, future in enumerate(futures):
        for attempt in range(1, ATTEMPTS + 1):
            try:
                groups.append(future.result())
                break
            # A lost sampler costs time: its successor is asked again.
            except SamplerDied:
                if attempt == ATTEMPTS:
                    raise
                future = ask(index)
    return groups


def write(folder: Path, step: int, evaluation: Evaluation) -> None:
    """`folder/step-NNNNNNNN.json`, from which `read` rebuilds the evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    content = asdict(evaluation) | {"step": step}
    if evaluation.log_q_O is not None:
        content["log_q_O"] = evaluation.log_q_O.tolist()
    part = folder / f".step-{step:08d}.part"
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(folder / f"step-{step:08d}.json")


def read(folder: Path) -> list[tuple[int, Evaluation]]:
    """All evaluations of a run with their steps, in order."""
    result = []
    for path in sorted(folder.glob("step-*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        step, log_q_O = content.pop("step"), content.pop("log_q_O")
        result.append((step, Evaluation(**content, log_q_O=None if log_q_O is None else np.array(log_q_O))))
    return result
