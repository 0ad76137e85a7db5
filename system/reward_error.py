"""What a reward raises for samples that it cannot score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from system.log_rewards import LogRewards
from system.run_error import RunError

if TYPE_CHECKING:
    import numpy as np


class RewardError(RunError):
    """A reward gave nothing that can be learned from for some of a group. The message has the first one's prompt and text."""

    def __init__(self, faults: dict[int, str], log_reward_K: Sequence[np.ndarray]) -> None:
        """`faults` says by a trajectory's index what is wrong with it; `log_reward_K` is good for the others."""
        super().__init__(faults, log_reward_K)
        self.faults, self.log_reward_K = faults, LogRewards.of(log_reward_K)

    def __str__(self) -> str:
        first, *others = self.faults.values()
        return first + (f" (and {len(others)} more of this group)" if others else "")


def tolerated(score: Callable[[], Sequence[np.ndarray]]) -> tuple[LogRewards, dict[int, str]]:
    """(log R at every prefix, what is wrong with a trajectory that has none, by its index) of what a reward is asked for.

    A border: tolerated on purpose; whoever asks counts what it lacks.
    """
    try:
        return LogRewards.of(score()), {}
    except RewardError as error:
        return error.log_reward_K, error.faults
