"""Samples that are known to be good, as groups: what supervised fine-tuning imitates and replay may start with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from system.config import ConfigError
from system.handles import Pool, Rewards, asked
from system.tasks.problem import Problem
from system.trajectory import Group, Prompt, Request

logger = logging.getLogger(__name__)


def shown(problem: Problem) -> list[Prompt]:
    """The prompts that have demonstrations. Raises ConfigError if none has."""
    prompts = [prompt for prompt in problem.trained if problem.demonstrations.get(prompt.id)]
    if not prompts:
        lost = f" ({problem.undrawable} cannot be drawn; the first: {problem.why_undrawable})" if problem.undrawable else ""
        raise ConfigError(
            "task: no prompt has a demonstration that the policy could draw, which loss.kind=mle and "
            f"replay.demonstrations=true need{lost}; see the task's fields for where they come from"
        )
    return prompts


def scored(problem: Problem, rewards: Rewards) -> list[Group]:
    """A group for each prompt that has demonstrations, with their rewards; those without one are left out, and counted in the
    log. Raises ConfigError if none has."""
    prompts = shown(problem)
    if problem.undrawable:
        drawable = sum(len(problem.demonstrations[prompt.id]) for prompt in prompts)
        logger.warning(
            "%d demonstrations are left out, and %d kept: the policy cannot draw them; the first: %s",
            problem.undrawable, drawable, problem.why_undrawable,
        )  # fmt: skip
    answers = [asked(partial(rewards.log_reward, prompt, problem.demonstrations[prompt.id])) for prompt in prompts]
    groups: list[Group] = []
    faults: list[str] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        group = answer().group(prompt, problem.demonstrations[prompt.id], -1, -1)
        faults += group.faults
        if len(group):
            groups.append(replace(group, faults=()))
    if not groups:
        raise ConfigError(f"task: no demonstration has a reward; the first that has none: {faults[0]}")
    if faults:
        logger.warning("%d demonstrations are left out, as they have no reward; the first: %s", len(faults), faults[0])
    return groups


class Demonstrations:
    """In place of samplers during training: every request is answered with the demonstrations of its prompt.

    Evaluations, whose requests have negative numbers, are passed on to the real samplers.
    """

    def __init__(self, groups: Sequence[Group], samplers: Pool, version: Callable[[], int]) -> None:
        """`version` is the adapter version published last, which the groups are given: they are never stale."""
        self._groups = {group.prompt.id: group for group in groups}
        self._samplers, self._version = samplers, version

    @property
    def deaths(self) -> int:
        return self._samplers.deaths

    def publish(self, adapter: Any) -> None:
        self._samplers.publish(adapter)

    def sample(self, request: Request) -> Future[Group]:
        if request.group_id < 0:
            return self._samplers.sample(request)
        future: Future[Group] = Future()
        group = self._groups[request.prompt.id]
        future.set_result(replace(group, adapter_version=self._version(), group_id=request.group_id))
        return future
