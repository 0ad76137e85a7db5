"""What a method of `actors.decoding` draws with, and what it gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.rewards import Reward
from actors.stepping import NextTokens, draw_columns
from system.constraints import Constraints
from system.scores import Scores
from system.trajectory import Prompt, Trajectory, sampled

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]
NOTHING = -1e30
"""log R of a sample without a reward, nats: no weight beside any other, and finite, as weights are differences of it."""


@dataclass(frozen=True)
class DecodingSettings:
    temperature: float = 0.8
    """Of `tempered`: each token from softmax(logits / temperature)."""
    top_p: float = 0.95
    """Of `nucleus`: each token from the fewest that have this mass."""
    penalty: float = 1.0
    """Of `diverse_beam`: nats for each earlier group that takes the same token at the same place."""
    oversample: int = 4
    """Of `best_of_n`, `sir` and `smc`: sequences drawn for each one that is kept."""
    twist: Literal["likelihood", "reward"] = "likelihood"
    """Of `smc`: what the intermediate target of a prefix is. `likelihood`: p(prefix)^(1/T) of the base model, over its whole
    vocabulary, times the factors of R that are known at every prefix and ask no model. `reward`: R(stopping there)^(1/T),
    scored anew at every step."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Up to K samples of one prompt: a search gives fewer where the support has fewer."""

    tokens_K: list[Tokens]
    """Without the stop."""
    log_q_K: np.ndarray | None = None
    """float64 [K], nats: what each was drawn with, independently and over the whole support; None if it was not so."""
    log_z: float | None = None
    """The method's own estimate of log Z, nats, Z being the sum of R^(1/T)."""
    model_tokens: int = 0
    """Tokens that policy and reward have read to get these; `decoding.draw` counts them."""

    def take(self, chosen: Sequence[int]) -> Draws:
        """Some of them, by their indices."""
        log_q_K = None if self.log_q_K is None else self.log_q_K[list(chosen)]
        return replace(self, tokens_K=[self.tokens_K[k] for k in chosen], log_q_K=log_q_K)

    def log_weights(self, log_target_K: np.ndarray) -> np.ndarray | None:
        """float64 [K], nats: weights whose mean estimates Z, given log R / T; None where the method has none.

        Samples that were resampled weigh the same.
        """
        if self.log_z is not None:
            return np.full(len(self.tokens_K), self.log_z)
        return None if self.log_q_K is None else log_target_K - self.log_q_K


class Decoder:
    """A Hugging Face model, base or adapted, with the support and the reward of the draws. They are repeatable by `seed`."""

    def __init__(
        self,
        model: PreTrainedModel,
        constraints: Constraints,
        reward: Reward,
        reward_temperature: float = 1.0,
        settings: DecodingSettings = DecodingSettings(),  # noqa: B008  # frozen
        seed: int = 0,
        prefix_reward: Reward | None = None,
    ) -> None:
        """`prefix_reward` is what `smc` asks for at every prefix."""
        self.prefix_reward = prefix_reward
        self.policy = NextTokens(model, constraints)
        self.constraints = constraints
        self.reward = reward
        self.reward_temperature = reward_temperature
        self.settings = settings
        self.generator = torch.Generator(self.policy.device).manual_seed(seed)
        self.faults = 0
        """How often a sample had no reward."""

    def scores(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        """As in training what has no reward is left out, and counted."""
        scores = self.reward.score(prompt, trajectories_K)
        if faults := scores.faults:
            self.faults += len(faults)
            logger.warning("%d samples of %s have no reward: %s", len(faults), prompt.id, next(iter(faults.values())))
        return scores

    def log_target(self, prompt: Prompt, tokens_K: Sequence[Tokens]) -> np.ndarray:
        """log R / T of whole sequences, float64 [K], nats; R of one without a reward is NOTHING."""
        if not tokens_K:
            return np.zeros(0)
        scores = self.scores(prompt, [sampled(list(tokens)) for tokens in tokens_K])
        log_reward_K = [NOTHING if k in scores.faults else scores.log_reward_K[k][-1] for k in range(len(tokens_K))]
        return np.array(log_reward_K) / self.reward_temperature

    def columns(self, log_q_BC: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """As `draw_columns`, by this decoder's seed."""
        return draw_columns(log_q_BC, self.generator)

    def resample(self, log_weight_P: np.ndarray, samples: int) -> np.ndarray:
        """Indices int64 [samples], systematic: each as often as its share of the weights, rounded up or down."""
        weights = np.exp(log_weight_P - log_weight_P.max())
        offset = torch.rand(1, generator=self.generator, device=self.policy.device).item()
        at = (np.arange(samples) + offset) / samples
        return np.minimum(np.searchsorted(np.cumsum(weights) / weights.sum(), at), len(weights) - 1)
