"""A reward for decoding without training: what it cannot score is worth nothing there, and counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import numpy as np

from actors.decoding import NOTHING
from actors.rewards import Reward
from system.log_rewards import LogRewards
from system.reward_error import tolerated
from system.trajectory import Prompt, Trajectory

logger = logging.getLogger(__name__)


class Tolerant:
    """A sample that the reward cannot score has log R = NOTHING: as in training it is left out, and counted."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.faults = 0

    @property
    def tokens_forwarded(self) -> int:
        return self._reward.tokens_forwarded

    @property
    def progress(self) -> int:
        return self._reward.progress

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> LogRewards:
        scores_K, faults = tolerated(partial(self._reward.score, prompt, trajectories_K))
        if faults:
            self.faults += len(faults)
            logger.warning("%d samples of %s have no reward: %s", len(faults), prompt.id, next(iter(faults.values())))
        worth = (
            np.full(len(trajectory) + 1, NOTHING) if k in faults else scores_K[k] for k, trajectory in enumerate(trajectories_K)
        )
        return LogRewards(worth, scores_K.factors_K)
