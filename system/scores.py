"""What a reward says of the samples of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from system.run_error import RunError
from system.trajectory import Group, Prompt, Trajectory


class RewardError(RunError):
    """A sample has no reward where one is needed of each."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """log R of K samples, and what is wrong with those that have none."""

    log_reward_K: Sequence[np.ndarray]
    """K arrays float64 [T + 1]: untempered log R, in nats, of stopping after each prefix; NaN where it has none. What
    stands for a faulty sample means nothing."""
    faults: Mapping[int, str] = field(default_factory=dict)
    """By the index of a sample that cannot be scored, why; with the prompt and the text."""
    factors_K: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By its name what each factor of a product says of a sample where it ends, in the factor's own unit: float64 [K]."""

    def complete(self) -> Sequence[np.ndarray]:
        """log R of all. Raises RewardError with the first fault, if there is one."""
        if self.faults:
            first, *others = self.faults.values()
            raise RewardError(first + (f" (and {len(others)} more of this group)" if others else ""))
        return self.log_reward_K

    @property
    def kept(self) -> list[int]:
        """Indices of the samples that have a reward."""
        return [k for k in range(len(self.log_reward_K)) if k not in self.faults]

    def group(self, prompt: Prompt, trajectories_K: Sequence[Trajectory], adapter_version: int, group_id: int) -> Group:
        """The samples that have a reward, with it; the group's faults say why others are not there."""
        kept = self.kept
        samples_K = list(zip(trajectories_K, self.log_reward_K, strict=True))
        return Group(
            prompt,
            tuple(samples_K[k][0] for k in kept),
            tuple(samples_K[k][1] for k in kept),
            adapter_version,
            group_id,
            tuple(self.faults.values()),
            {name: value_K[kept] for name, value_K in self.factors_K.items()},
        )
