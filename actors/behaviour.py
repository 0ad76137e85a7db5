"""What a trajectory is drawn from, as arithmetic on a batch of logits: support, temperature, epsilon-uniform mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from system.constraints import Constraints


class BehaviourLogits:
    """Turns the model's logits into the log of (1 - epsilon) * softmax(logits / temperature) + epsilon * uniform(support).

    The support is that of `constraints`: under the minimum length the stop is neither in the softmax nor in the mixture.
    """

    def __init__(self, constraints: Constraints, width: int, device: torch.device) -> None:
        """`width` is that of the logits, which some models pad beyond the vocabulary."""
        outside_V = torch.ones(width, dtype=torch.bool)
        outside_V[torch.from_numpy(constraints.columns)] = False
        self._outside_V = outside_V.to(device) if outside_V.any() else None
        self._size = len(constraints.columns)
        self._stop = constraints.stop_token
        self._min_tokens = constraints.min_tokens

    def rows(self, logits_BV: torch.Tensor, rows_B: Sequence[tuple[float, float, Sequence[int]]]) -> torch.Tensor:
        """As `__call__`, for rows given as temperature, epsilon and the tokens drawn so far."""
        temperature, epsilon, tokens = zip(*rows_B, strict=True)
        no_stop = [len(drawn) < self._min_tokens for drawn in tokens]
        return self(logits_BV, *(torch.tensor(column, device=logits_BV.device) for column in (temperature, epsilon, no_stop)))

    def __call__(
        self, logits_BV: torch.Tensor, temperature_B: torch.Tensor, epsilon_B: torch.Tensor, no_stop_B: torch.Tensor
    ) -> torch.Tensor:
        """Unnormalised log-probabilities, float32 [B, V], -inf outside the support; `logits_BV` is overwritten.

        `no_stop_B` is true where the depth is under the minimum length. All arguments are on one device.
        """
        logits_BV.div_(temperature_B[:, None])
        self._mask(logits_BV, no_stop_B)
        mixed = torch.nonzero(epsilon_B > 0).squeeze(1)
        if len(mixed):
            size_M = self._size - no_stop_B[mixed].float()
            share_M = epsilon_B[mixed]
            probs_MV = torch.softmax(logits_BV[mixed], dim=-1)
            probs_MV.mul_((1 - share_M)[:, None]).add_((share_M / size_M)[:, None]).log_()
            logits_BV[mixed] = self._mask(probs_MV, no_stop_B[mixed])
        return logits_BV

    def _mask(self, values_BV: torch.Tensor, no_stop_B: torch.Tensor) -> torch.Tensor:
        if self._outside_V is not None:
            values_BV.masked_fill_(self._outside_V, -torch.inf)
        values_BV[:, self._stop].masked_fill_(no_stop_B, -torch.inf)
        return values_BV
