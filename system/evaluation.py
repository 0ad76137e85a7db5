"""How good the current policy is: from log-probs alone where outcomes or choices can be listed, else from on-policy samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from system.handles import GroupLogQ, Rewards, Samplers, Scorer, asked
from system.posterior import Bounds, Exact, mean_metrics
from system.requests import evaluation_request
from system.run_error import RunError
from system.scores import RewardError
from system.tasks.problem import Problem
from system.trajectory import ON_POLICY, Behaviour, Group, Prompt, Request, Trajectory
from system.voting import preferred, tally

logger = logging.getLogger(__name__)

T = TypeVar("T")
AT_ONCE = 256
"""Groups of one call for scores."""
ENOUGH = 2
"""Samples of a prompt with a reward, for bounds. As in training, others are tolerated."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    metrics: dict[str, float]
    per_prompt: list[dict[str, Any]] = field(default_factory=list)
    """One row a prompt: its bounds."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """One row a sample: prompt, text, length in tokens, log q, log R, and what each factor of a product says."""
    log_q_O: np.ndarray | None = None
    """log q of the listed outcomes of the first prompt."""


def without_samples(problem: Problem, scorer: Scorer, most: int | None = None) -> Evaluation | None:
    """The evaluation from log-probs alone; None where neither the outcomes nor the choices can be listed. Choices are asked for
    `most` records, where there are more."""
    if needs_samples(problem):
        return None
    return chosen(problem, scorer, most) if problem.outcomes is None else exact(problem, scorer)


def needs_samples(problem: Problem) -> bool:
    """Neither the outcomes nor the choices can be listed."""
    return problem.outcomes is None and not problem.choices


def exact(problem: Problem, scorer: Scorer) -> Evaluation:
    """q against the target over all listed outcomes, from log-probs and not from samples. Means over prompts."""
    assert problem.outcomes is not None and problem.log_target_O is not None
    scores = _scores(problem.prompts, scorer, problem.outcomes)
    results = [Exact.of(score.log_q_K, problem.log_target_O).metrics() for score in scores]
    metrics = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    rows = [{"prompt": p.id, **result} for p, result in zip(problem.prompts, results, strict=True)]
    return Evaluation(metrics, rows, log_q_O=scores[0].log_q_K)


def evenly(items: Sequence[T], count: int | None) -> Sequence[T]:
    """`count` of them, evenly spaced; all, where there are no more."""
    if count is None or len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def chosen(problem: Problem, scorer: Scorer, most: int | None = None) -> Evaluation:
    """The policy's likeliest choice for each prompt, and the vote of the prompts of each record. Means over `most` records.

    Also task/log_likelihood: log q of what is right, nats, the mean over prompts.
    """
    by_record: dict[str, list[Prompt]] = {}
    for prompt in problem.evaluated:
        by_record.setdefault(problem.record(prompt), []).append(prompt)
    prompts = [prompt for record in evenly(list(by_record), most) for prompt in by_record[record]]
    keys = [choice.key for choice in problem.choices]
    votes: dict[str, list[int]] = {}
    truths: dict[str, int] = {}
    rows = []
    for prompt, score in zip(prompts, _scores(prompts, scorer, problem.choices), strict=True):
        record = problem.record(prompt)
        [right] = problem.demonstrations[prompt.id]
        truths[record] = keys.index(right.key)
        votes.setdefault(record, []).append(int(score.log_q_K.argmax()))
        rows.append({"prompt": prompt.id, "task/log_likelihood": float(score.log_q_K[truths[record]])})
    results = [tally(np.array(votes[record]), truths[record]) for record in votes]
    metrics = {f"task/{name}": float(np.mean([result[name] for result in results])) for name in results[0]}
    metrics["task/log_likelihood"] = float(np.mean([row["task/log_likelihood"] for row in rows]))
    return Evaluation(metrics, rows)


def _scores(prompts: Sequence[Prompt], scorer: Scorer, trajectories_O: tuple[Trajectory, ...]) -> list[GroupLogQ]:
    """log q of these trajectories for each prompt. Their rewards are not asked for."""
    unknown = tuple(np.zeros(len(trajectory) + 1) for trajectory in trajectories_O)
    groups = [Group(prompt, trajectories_O, unknown, 0, 0) for prompt in prompts]
    return _in_parts(groups, scorer)


def _in_parts(groups: Sequence[Group], scorer: Scorer) -> list[GroupLogQ]:
    """log q of each group. A learner that answers nothing for long counts as hung, so one call is not for all of many."""
    return [score for at in range(0, len(groups), AT_ONCE) for score in scorer.score(groups[at : at + AT_ONCE]).result()]


Judge = Callable[[Group], dict[str, float]]


def judge(
    problem: Problem,
    decode: Callable[[Sequence[int]], str],
    rewards: Rewards,
    diversity: Callable[[Sequence[str]], float] | None = None,
) -> Judge:
    """The task's own verdict on a group, the diversity of its texts where there is a measure of it, and its samples' vote where
    the evidence has alternatives."""

    def verdict(group: Group) -> dict[str, float]:
        result = {}
        tokens_K = [trajectory.tokens_T.tolist() for trajectory in group.trajectories_K]
        texts = [decode(tokens) for tokens in tokens_K]
        if problem.judge is not None:
            result |= problem.judge(group.prompt, texts, tokens_K, len(group.faults))
        if diversity is not None and texts:
            result["diversity"] = diversity(texts)
        if others := problem.alternatives.get(group.prompt.id):
            try:
                votes_K = preferred(log_reward_EK(group, others, rewards)) if texts else np.zeros(0, np.int64)
            # As in training, where the samples are left out: here it is the prompt's vote.
            except RewardError as error:
                logger.warning("evaluation: %s has no vote, as its samples have no reward: %s", group.prompt.id, error)
            else:
                # Its own evidence comes last: `preferred` gives a tie to what comes first, and a tie is not right.
                result |= tally(votes_K, truth=len(others), unscored=len(group.faults))
        return result

    return verdict


def log_reward_EK(group: Group, others: Sequence[tuple[int, ...]], rewards: Rewards) -> np.ndarray:
    """float64 [E, K]: log R of each sample with each of the other evidences, and last with the group's own, nats.

    Raises RewardError where one has none."""
    prompts = [replace(group.prompt, evidence_tokens=evidence) for evidence in others]
    answers = [asked(partial(rewards.log_reward, prompt, group.trajectories_K)) for prompt in prompts]
    of_others = [[log_reward_T[-1] for log_reward_T in answer().complete()] for answer in answers]
    return np.array([*of_others, group.end_log_reward_K])


def sampled(
    prompts: Sequence[Prompt],
    samplers: Samplers,
    scorer: Scorer,
    *,
    samples: int,
    temperature: float,
    seed: int,
    round_: int,
    decode: Callable[[Sequence[int]], str],
    judge: Judge = lambda group: {},
    behaviour: Behaviour = ON_POLICY,
) -> Evaluation:
    """Bounds on log Z, ESS and spread from `samples` draws of each prompt, at reward temperature `temperature`. `seed` and
    `round_` as in `evaluation_request`.

    Draws by another `behaviour` than the policy's own bound nothing: then the metrics are task/… and the samples' length.

    Each prompt's row has what `of_task` says of its group, and the metrics the means (a prompt without a metric takes no part
    in its mean). A prompt of which fewer than two samples have a reward is in the task's means alone. task/unscored is the
    share of all samples that have none.

    Raises:
        SamplerDied: the samplers that a prompt was given to died again and again.
        RunError: no prompt has two samples with a reward.
    """
    requests = [
        evaluation_request(prompt, index, samples, seed=seed, round_=round_, behaviour=behaviour)
        for index, prompt in enumerate(prompts)
    ]
    drawn = _draw(requests, samplers)
    groups = [group for group in drawn if len(group) >= ENOUGH]
    if not groups:
        first = next((fault for group in drawn for fault in group.faults), "the samplers drew none")
        raise RunError(
            "no prompt of the evaluation has two samples with a reward; mend the reward, or draw more samples "
            f"(learner.evaluation_samples, or --samples); the first without one: {first}"
        )
    scores = _in_parts(groups, scorer)
    bounds_G, per_prompt, table = [], [], []
    for group, score in zip(groups, scores, strict=True):
        log_reward_K = group.end_log_reward_K
        bounds = Bounds.of(log_reward_K / temperature - score.log_q_K, group.drawn)
        bounds_G.append(bounds)
        lengths = [len(trajectory) for trajectory in group.trajectories_K]
        row = {name: getattr(bounds, name) for name in Bounds.__dataclass_fields__}
        row |= {"length": float(np.mean(lengths))} | of_task(group, judge)
        per_prompt.append({"prompt": group.prompt.id, **row})
        for k, trajectory in enumerate(group.trajectories_K):
            of = {"prompt": group.prompt.id, "text": decode(trajectory.tokens_T.tolist()), "length": len(trajectory)}
            of |= {"log_q": float(score.log_q_K[k]), "log_reward": float(log_reward_K[k])}
            table.append(of | group.factors_of(k))
    metrics = {}
    if behaviour == ON_POLICY:
        metrics |= mean_metrics(bounds_G)
        metrics["posterior/log_q_stop"] = float(np.mean([score.log_q_stop_K.mean() for score in scores]))
        gaps = [_engine_gap(group, score.log_q_K) for group, score in zip(groups, scores, strict=True)]
        metrics["posterior/engine_gap"] = float(np.mean(gaps))
    metrics["posterior/length"] = float(np.mean([row["length"] for row in per_prompt]))
    metrics |= means([*per_prompt, *(of_task(group, judge) for group in drawn if len(group) < ENOUGH)])
    metrics["task/unscored"] = sum(len(group.faults) for group in drawn) / sum(group.drawn for group in drawn)
    return Evaluation(metrics, per_prompt, table)


def of_task(group: Group, judge: Judge) -> dict[str, float]:
    """Metrics task/… of one prompt's samples: largest and mean log R (nats), the mean of what each factor of a product says,
    the share of different samples, all of those that have a reward; and what `judge` says, which counts the others as wrong,
    and may count as one answer what differs in its tokens."""
    metrics = {}
    if len(group):
        log_reward_K = group.end_log_reward_K
        metrics = {
            "max_log_reward": float(log_reward_K.max()),
            "mean_log_reward": float(log_reward_K.mean()),
            "distinct": len({trajectory.key for trajectory in group.trajectories_K}) / len(group),
        }
        metrics |= {f"reward/{name}": float(value_K.mean()) for name, value_K in group.factors_K.items()}
    return {f"task/{name}": value for name, value in (metrics | judge(group)).items()}


def _engine_gap(group: Group, log_q_K: np.ndarray) -> float:
    """Mean difference of a sample's log q by the engine that drew it from that by the learner, nats: bounds take the learner's
    for what samples were drawn with."""
    drawn_K = np.array([trajectory.logp_T.sum(dtype=np.float64) for trajectory in group.trajectories_K])
    return float(np.abs(drawn_K - log_q_K).mean())


def means(per_prompt: Sequence[Mapping[str, Any]], prefix: str | tuple[str, ...] = "task/") -> dict[str, float]:
    """Means of the metrics of that prefix over the prompts that have them: a missing one or NaN is no verdict."""
    names = dict.fromkeys(name for row in per_prompt for name in row if name.startswith(prefix))
    values = {name: [row[name] for row in per_prompt if not math.isnan(row.get(name, math.nan))] for name in names}
    return {name: float(np.mean(known)) for name, known in values.items() if known}


def _draw(requests: Sequence[Request], samplers: Samplers) -> list[Group]:
    answers = [asked(partial(samplers.sample, request)) for request in requests]
    groups = [answer() for answer in answers]
    for group in groups:
        if group.faults:
            logger.warning(
                "evaluation: %d samples of %s have no reward: %s", len(group.faults), group.prompt.id, group.faults[0]
            )
    return groups
