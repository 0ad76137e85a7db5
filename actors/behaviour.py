"""What a trajectory is drawn from, as arithmetic on a batch of logits: support, temperature, epsilon-uniform mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from system.constraints import Constraints
from system.required import Required
from system.tools import Player
from system.trajectory import Behaviour


@dataclass(frozen=True, eq=False)
class Row:
    """A running sample: how its next token is drawn."""

    temperature: float
    epsilon: float
    depth: int
    """Actions so far."""
    forced: int | None = None
    """The token that must come next."""
    open_from: int = 0
    """The depth before which the stop is not drawn, whatever the minimum length is."""
    may_stop: bool = True
    """Nothing that must be there is missing."""


@dataclass(frozen=True, eq=False)
class Running:
    """A sample that vLLM draws; it lets `output` grow."""

    behaviour: Behaviour
    output: list[int]
    player: Player
    required: Required | None = None

    def row(self) -> Row:
        """After taking in the tokens drawn since the last time."""
        for token in self.output[len(self.player.is_action) :]:
            self.player.push(token)
        behaviour, depth, forced, may_stop = self.behaviour, self.player.depth, self.player.forced, True
        if self.required:
            may_stop, forced = self.required.after(self.output)
        if forced is None:
            forced = next((token for at, token in behaviour.planted if at == depth), None)
        return Row(behaviour.temperature, behaviour.epsilon, depth, forced, behaviour.open_from, may_stop)


class BehaviourLogits:
    """Turns the model's logits into the log of (1 - epsilon) * softmax(logits / temperature) + epsilon * uniform(support).

    The support is that of `constraints`: under the minimum length, before what is planted, and where something required is
    missing, the stop is neither in the softmax nor in the mixture.
    """

    def __init__(self, constraints: Constraints, width: int, device: torch.device) -> None:
        """`width` is that of the logits, which some models pad beyond the vocabulary."""
        outside_V = torch.ones(width, dtype=torch.bool)
        outside_V[torch.tensor(constraints.columns)] = False
        self._outside_V = outside_V.to(device) if outside_V.any() else None
        self._buffer: torch.Tensor | None = None
        self._size = len(constraints.columns)
        self._stop = constraints.stop_token
        self._min_tokens, self._max_tokens = constraints.min_tokens, constraints.max_tokens

    def rows(self, logits_BV: torch.Tensor, rows_B: Sequence[Row]) -> torch.Tensor:
        """As `__call__`, for the rows of a batch. A forced token has log-probability 0, and so has a forced stop."""
        values_B = [
            (row.temperature, row.epsilon, not row.may_stop or row.depth < max(self._min_tokens, row.open_from))
            for row in rows_B
        ]
        columns = zip(*values_B, strict=True)
        result_BV = self(logits_BV, *(torch.tensor(column, device=logits_BV.device) for column in columns))
        for number, row in enumerate(rows_B):
            forced = row.forced if row.forced is not None else self._stop if row.depth >= self._max_tokens else None
            if forced is not None:
                result_BV[number] = -torch.inf
                result_BV[number, forced] = 0.0
        return result_BV

    def __call__(
        self, logits_BV: torch.Tensor, temperature_B: torch.Tensor, epsilon_B: torch.Tensor, no_stop_B: torch.Tensor
    ) -> torch.Tensor:
        """Unnormalised log-probabilities, float32 [B, V], -inf outside the support; `logits_BV` is overwritten.

        `no_stop_B` is true where the stop is outside the support. All arguments are on one device.
        """
        logits_BV.div_(temperature_B[:, None])
        self._mask(logits_BV, no_stop_B)
        mixed_M = torch.nonzero(epsilon_B > 0).squeeze(1)
        if len(mixed_M):
            no_stop_M, epsilon_M = no_stop_B[mixed_M], epsilon_B[mixed_M]
            values_MV = torch.index_select(logits_BV, 0, mixed_M, out=self._scratch(len(mixed_M), logits_BV))
            values_MV.sub_(values_MV.amax(dim=1, keepdim=True)).exp_()
            # exp(logit) + c, where c is to the sum of all exp(logit) what each token's uniform share is to 1 - epsilon.
            share_M = epsilon_M / (1 - epsilon_M) / (self._size - no_stop_M.float())
            values_MV.add_(values_MV.sum(dim=1, keepdim=True).mul_(share_M[:, None])).log_()
            logits_BV.index_copy_(0, mixed_M, self._mask(values_MV, no_stop_M))
        return logits_BV

    def _scratch(self, rows: int, like_BV: torch.Tensor) -> torch.Tensor:
        """Kept between steps: a fresh buffer of megabytes costs more in page faults than the arithmetic in it."""
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = torch.empty(rows, like_BV.shape[1], dtype=like_BV.dtype, device=like_BV.device)
        return self._buffer[:rows]

    def _mask(self, values_BV: torch.Tensor, no_stop_B: torch.Tensor) -> torch.Tensor:
        if self._outside_V is not None:
            values_BV.masked_fill_(self._outside_V, -torch.inf)
        values_BV[:, self._stop].masked_fill_(no_stop_B, -torch.inf)
        return values_BV
