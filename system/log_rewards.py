"""What a reward says of the samples of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np


class LogRewards(list[np.ndarray]):
    """K arrays float64 [T + 1]: untempered log R, in nats, of stopping after each prefix."""

    def __init__(self, log_reward_K: Iterable[np.ndarray], factors_K: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__(log_reward_K)
        self.factors_K: dict[str, np.ndarray] = dict(factors_K or {})
        """By its name what each factor of a product says of a sample where it ends, in the factor's own unit: float64 [K]."""

    @classmethod
    def of(cls, log_reward_K: Sequence[np.ndarray]) -> LogRewards:
        """What a reward returned, which may be a list alone."""
        return log_reward_K if isinstance(log_reward_K, LogRewards) else cls(log_reward_K)

    def only(self, kept: Sequence[int]) -> LogRewards:
        """Of these samples, in this order."""
        return LogRewards((self[k] for k in kept), {name: value_K[list(kept)] for name, value_K in self.factors_K.items()})
