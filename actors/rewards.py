"""Rewards of a config: what all have, their products, and the check of what they give.

The frozen model's are in `posterior_reward`, a python function's in `function_reward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from actors.function_reward import Function
from actors.posterior_reward import Contrast, Posterior
from system.function_process import FunctionProcesses
from system.functions import import_function
from system.language_model import LanguageModel
from system.reward_config import (
    ContrastReward,
    Factor,
    FunctionReward,
    LMPosterior,
    ProductReward,
    at_ends,
    factors,
    names,
)
from system.scores import Scores
from system.trajectory import Prompt, Trajectory


class Reward(Protocol):
    @property
    def tokens_forwarded(self) -> int:
        """Tokens that a model has computed for it since the start."""
        ...

    @property
    def progress(self) -> int:
        """Grows while it scores: tokens that a model has computed, calls that came back."""
        ...

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        """Of a group at once, since the samples of a prompt share prefixes."""
        ...


class Part(NamedTuple):
    """A factor of a product."""

    name: str
    reward: Reward
    unit: float = 1.0
    """Nats of its log R times this are what it is reported in."""


class Product:
    """The product of rewards: log-rewards add up, and a state has one where all factors have one. What each factor says of a
    sample goes with the result."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    @property
    def tokens_forwarded(self) -> int:
        return sum(part.reward.tokens_forwarded for part in self.parts)

    @property
    def progress(self) -> int:
        return sum(part.reward.progress for part in self.parts)

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        # Every factor has its say, so that what is left of a group is whole.
        scores = [part.reward.score(prompt, trajectories_K) for part in self.parts]
        log_reward_K = [np.sum(per_factor, axis=0) for per_factor in zip(*(each.log_reward_K for each in scores), strict=True)]
        faults: dict[int, str] = {}
        for each in scores:
            faults = {**each.faults, **faults}
        ends = {
            part.name: part.unit * np.array([log_reward_T[-1] for log_reward_T in each.log_reward_K])
            for part, each in zip(self.parts, scores, strict=True)
        }
        return Scores(log_reward_K, faults, ends)


class Checked:
    """Refuses what no learner could use: a log R at the end that is not finite, or an infinity anywhere.

    Inside a tool's output nothing can stop, so there is NaN.
    """

    def __init__(self, reward: Reward, decode: Callable[[list[int]], str]) -> None:
        self.reward = reward
        self.decode = decode

    @property
    def tokens_forwarded(self) -> int:
        return self.reward.tokens_forwarded

    @property
    def progress(self) -> int:
        return self.reward.progress

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        scores = self.reward.score(prompt, trajectories_K)
        if len(scores.log_reward_K) != len(trajectories_K):
            fault = f"prompt {prompt.id!r}: {len(scores.log_reward_K)} log-rewards for {len(trajectories_K)} trajectories"
            nothing_K = [np.full(len(trajectory) + 1, np.nan) for trajectory in trajectories_K]
            return Scores(nothing_K, dict.fromkeys(range(len(trajectories_K)), fault))
        log_reward_K, faults = [], dict(scores.faults)
        for k, (trajectory, log_reward_T) in enumerate(zip(trajectories_K, scores.log_reward_K, strict=True)):
            if k not in faults and not _learnable(trajectory, log_reward_T):
                faults[k] = (
                    f"prompt {prompt.id!r}: log R {log_reward_T.tolist()} for {self.decode(trajectory.tokens_T.tolist())!r} "
                    f"({len(trajectory)} tokens); {len(trajectory) + 1} values are needed, finite at the end"
                )
            can_stop_T = np.append(trajectory.is_action_T, True)
            log_reward_K.append(log_reward_T if k in faults else np.where(can_stop_T, log_reward_T, np.nan))
        return Scores(log_reward_K, faults, scores.factors_K)


def _learnable(trajectory: Trajectory, log_reward_T: np.ndarray) -> bool:
    return len(log_reward_T) == len(trajectory) + 1 and bool(np.isfinite(log_reward_T[-1]) and not np.isinf(log_reward_T).any())


def needs_language_model(section: LMPosterior | FunctionReward | ProductReward) -> bool:
    return any(isinstance(factor, (LMPosterior, ContrastReward)) for _, factor in factors(section))


def build(
    section: LMPosterior | FunctionReward | ProductReward,
    *,
    model: LanguageModel | None,
    stop: Sequence[int],
    decode: Callable[[list[int]], str],
    token_budget: int | None,
    may_stop: Callable[[Sequence[int], int], bool] = lambda tokens, actions: True,
    evidences: Mapping[str, Sequence[tuple[int, ...]]] | None = None,
) -> Reward:
    """The reward of a config section `task.reward`; `model` may be None where `needs_language_model` says so.

    `may_stop` says whether a sample can stop after these tokens, of which so many are actions; `evidences` are what a contrast
    is over, by a prompt's id.

    Raises:
        ConfigError: a function cannot be imported.
    """

    def one(field: str, factor: Factor) -> Reward:
        if isinstance(factor, FunctionReward):
            function = _function(factor, f"{field}.path")
            how: dict[str, Any] = {"batch": factor.batch, "concurrency": factor.concurrency}
            return Function(function, decode, factor.beta, factor.every_prefix, may_stop, **how)
        if model is None:
            raise ValueError(f"a reward of kind {factor.kind} needs the frozen model")
        posterior = Posterior(model, stop, token_budget, factor.every_prefix)
        return Contrast(posterior, evidences or {}, factor.power) if isinstance(factor, ContrastReward) else posterior

    if isinstance(section, ProductReward):
        # Where one factor is not known, what the others say is for nothing.
        section = section if section.every_prefix else at_ends(section)
        parts = zip(names(section), factors(section), strict=True)
        return Checked(Product([Part(name, one(*factor), factor[1].unit) for name, factor in parts]), decode)
    [factor] = factors(section)
    return Checked(one(*factor), decode)


def _function(section: FunctionReward, field: str) -> Callable[..., Any]:
    if section.seconds is None:
        return import_function(section.path, field)
    return FunctionProcesses(section.path, field, section.seconds, section.start_seconds, section.concurrency)
