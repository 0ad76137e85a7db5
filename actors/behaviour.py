"""How the next tokens of samples are drawn: support, temperature and epsilon-uniform mixture, on a batch of logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from system.constraints import Constraints
from system.tools import Player
from system.trajectory import Behaviour

ROWS_AT_ONCE = 16
"""On a CPU: rows of logits whose probabilities, of 49,152 tokens say, are in a core's cache together."""


@dataclass(frozen=True, eq=False)
class Row:
    """A running sample: how its next token is drawn."""

    temperature: float
    epsilon: float
    uniforms: tuple[float, float]
    """In [0, 1): where in the distribution the draw falls, and in which part of the mixture."""
    forced: int | None = None
    """The token that must come next."""
    may_stop: bool = True
    """The stop may be drawn."""


@dataclass(frozen=True, eq=False)
class Running:
    """A sample that vLLM draws; it lets `output` grow."""

    behaviour: Behaviour
    output: list[int]
    constraints: Constraints
    player: Player
    uniforms_T2: np.ndarray
    """The randomness of each of its tokens, so that one that is drawn again is the same."""
    drawn: list[tuple[int, float]]
    """Each token drawn so far, with its log-probability, nats."""

    def row(self) -> Row:
        """After taking in the tokens drawn since the last time."""
        for token in self.output[len(self.player.is_action) :]:
            self.player.push(token)
        behaviour, depth = self.behaviour, self.player.depth
        may_stop, certain = self.constraints.after(self.output, depth)
        planted = next((token for at, token in behaviour.planted if at == depth), None)
        # What a tool writes comes before all, also before the stop of a sample that has all its actions.
        forced = next((token for token in (self.player.forced, certain, planted) if token is not None), None)
        where, which = self.uniforms_T2[len(self.output)].tolist()
        may_stop = may_stop and depth >= behaviour.open_from
        return Row(behaviour.temperature, behaviour.epsilon, (where, which), forced, may_stop)

    def record(self, token: int, logp: float) -> None:
        """What is drawn next; it takes the place of what vLLM had drawn here and left out."""
        self.drawn[len(self.output) :] = [(token, logp)]


class TokenDraw:
    """Draws from (1 - epsilon) * softmax(logits / temperature) + epsilon * uniform, both over the support: the columns of
    `constraints`, less the stop in a row that may not stop.

    vLLM itself would draw an exponential for every token of the vocabulary; here one number falls into one token's share.
    """

    def __init__(self, constraints: Constraints, device: torch.device) -> None:
        columns = torch.from_numpy(constraints.columns)
        self._size = len(columns)
        everything = bool(columns[-1] == self._size - 1)
        self._columns_C = None if everything else columns.to(device)
        """None: the first tokens, all of them."""
        self._stop_column = constraints.stop_column

    def __call__(self, logits_BV: torch.Tensor, rows_B: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [B], their log-probabilities float64 [B] under what they were drawn from, nats), on the logits' device.

        A forced token has log-probability 0. Logits without a value give log-probabilities without one. `logits_BV` may be
        wider than the vocabulary, as some models pad it.
        """
        together = ROWS_AT_ONCE if logits_BV.device.type == "cpu" else len(rows_B)
        starts = range(0, len(rows_B), together)
        parts = [self._draw(logits_BV[at : at + together], rows_B[at : at + together]) for at in starts]
        token_B, logp_B = (torch.cat(part) for part in zip(*parts, strict=True))
        if forced := {number: row.forced for number, row in enumerate(rows_B) if row.forced is not None}:
            at_F, token_F = torch.tensor(list(forced.items()), device=token_B.device).T
            token_B[at_F], logp_B[at_F] = token_F, 0.0
        return token_B, logp_B

    def _draw(self, logits_BV: torch.Tensor, rows_B: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        def column(values: Iterable[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(list(values), dtype=dtype, device=logits_BV.device)

        no_stop_B = column((not row.may_stop for row in rows_B), torch.bool)
        epsilon_B = column((row.epsilon for row in rows_B), torch.float64)
        # The one number says which part of the mixture draws, the other which of its tokens.
        where_B, which_B = (column((row.uniforms[i] for row in rows_B), torch.float64) for i in range(2))
        logits_BC = logits_BV[:, : self._size] if self._columns_C is None else logits_BV[:, self._columns_C]
        scaled_BC = logits_BC / column((row.temperature for row in rows_B), torch.float32)[:, None]
        scaled_BC[:, self._stop_column].masked_fill_(no_stop_B, -torch.inf)
        p_BC = scaled_BC.softmax(1)

        # In float64, or what is rare would be lost beside the sum.
        upto_BC = p_BC.cumsum(1, dtype=torch.float64)
        by_softmax_B = torch.searchsorted(upto_BC, (where_B * upto_BC[:, -1])[:, None], right=True)[:, 0]
        size_B = self._size - no_stop_B.long()
        uniform_B = (where_B * size_B).long()
        uniform_B += no_stop_B & (uniform_B >= self._stop_column)
        column_B = torch.where(which_B < epsilon_B, uniform_B, by_softmax_B).clamp_(max=self._size - 1)
        p_B = p_BC.gather(1, column_B[:, None])[:, 0].double()
        token_B = column_B if self._columns_C is None else self._columns_C[column_B]
        return token_B, ((1 - epsilon_B) * p_B + epsilon_B / size_B).log()
