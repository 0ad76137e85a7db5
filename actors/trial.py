"""One call of each function of a reward, before a run pays for what is wrong with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np

from actors.function_reward import Function, NoReward
from system.config import ConfigError
from system.constraints import Constraints
from system.function_process import FunctionProcess
from system.reward_config import FunctionReward, Reward, factors
from system.tasks.problem import Problem
from system.trajectory import Trajectory, sampled


def trial(reward: Reward, problem: Problem, decode: Callable[[list[int]], str]) -> list[str]:
    """What functions of the reward raise, take too long for, or have no finite number for, on the first prompt: a warning,
    since some text may be nothing that a function can judge, and a run goes on without that sample.

    Raises:
        ConfigError: a function cannot be had or be called, or returned what is no number.
    """
    prompt, found = problem.trained[0], []
    samples = problem.demonstrations.get(prompt.id) or problem.outcomes or _drawable(problem.constraints)
    for field, factor in factors(reward):
        if not isinstance(factor, FunctionReward):
            continue
        limit = factor.seconds or factor.start_seconds
        with contextlib.closing(FunctionProcess(factor.path, f"{field}.path", limit, factor.start_seconds)) as process:
            process.start()
            function = Function(process, decode, factor.beta, batch=factor.batch)
            # Of a batch a value for each has to come back, so that two say more than one.
            faults = function.score(prompt, samples[: 1 + factor.batch]).faults.values()
        for fault in list(faults)[:1]:
            message = f"{field}.path={factor.path!r}: {fault}"
            if isinstance(fault, NoReward):
                raise ConfigError(message)
            found.append(f"{message}; a sample without a reward is left out of training, and counts as wrong in evaluations")
    return found


def _drawable(constraints: Constraints) -> tuple[Trajectory, ...]:
    """Some tokens of the support, and fewer of them."""
    allowed = constraints.columns[constraints.columns != constraints.stop_token]
    length = min(max(3, constraints.min_tokens), constraints.max_tokens)
    # From the middle of the vocabulary: byte-pair tokenizers begin with single bytes, and words come later.
    tokens_T = np.resize(allowed[len(allowed) // 2 :], length)
    return sampled(tokens_T), sampled(tokens_T[:-1])
