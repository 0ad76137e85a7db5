"""The output layer without its logits: log-probs of chosen tokens, a chunk of positions at a time, forward and backward.

Materialised, the logits of 4,096 positions over 49,152 tokens are 805 MB in float32, and autograd keeps several copies.
Here a chunk's logits live only while it is worked on; the backward pass computes them again, in place. Those of the last chunk
wait for it, since it begins with them: a row of one chunk, as a group's tree mostly is, computes its logits once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, eq=False)
class Head:
    """A frozen output layer, over all tokens or over the columns of a support."""

    weight_CH: Tensor
    bias_C: Tensor | None = None
    softcap: float | None = None
    """Logits are softcap * tanh(logits / softcap), in the models that have it."""
    stop_column: int | None = None
    closed_M: Tensor | None = None
    """bool [M]: positions at which the stop column is outside the support."""
    chunk: int = 256

    def logits(self, hidden_MH: Tensor, start: int) -> Tensor:
        """float32 [m, C] of positions from `start`: fresh memory, which the caller may overwrite."""
        stop = start + self.chunk
        logits_mC = linear(hidden_MH[start:stop], self.weight_CH, self.bias_C).float()
        if self.softcap:
            logits_mC.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.closed_M is not None:
            logits_mC[:, self.stop_column].masked_fill_(self.closed_M[start:stop], -torch.inf)
        return logits_mC


class ChunkedLogProbs(torch.autograd.Function):
    """(hidden [M, H], head, row [Q], column [Q]) -> float32 [Q] log-softmax; rows ascend, and no gradient reaches the head."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, head: Head, row_Q: Tensor, column_Q: Tensor) -> Tensor:
        result_Q = torch.empty(len(row_Q), dtype=torch.float32, device=hidden_MH.device)
        lse_M = torch.empty(len(hidden_MH), dtype=torch.float32, device=hidden_MH.device)
        logits_mC: Tensor | None = None
        for start, low, high in _chunks(len(hidden_MH), head.chunk, row_Q):
            logits_mC = head.logits(hidden_MH, start)
            lse_m = logits_mC.logsumexp(-1)
            row_q = row_Q[low:high] - start
            result_Q[low:high] = logits_mC[row_q, column_Q[low:high]] - lse_m[row_q]
            lse_M[start : start + head.chunk] = lse_m
        ctx.save_for_backward(hidden_MH, row_Q, column_Q, lse_M)
        ctx.head = head
        ctx.last = logits_mC
        return result_Q

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """d log p(c) / d logit(j) = [j = c] - p(j), summed over the queries of a position."""
        (gradient_Q,) = gradients
        hidden_MH, row_Q, column_Q, lse_M = ctx.saved_tensors
        head: Head = ctx.head
        gradient_MH = torch.zeros_like(hidden_MH)
        total_M = torch.zeros_like(lse_M).index_add_(0, row_Q, gradient_Q)
        waiting, ctx.last = ctx.last, None
        for start, low, high in reversed(list(_chunks(len(hidden_MH), head.chunk, row_Q))):
            stop = start + head.chunk
            logits_mC = head.logits(hidden_MH, start) if waiting is None else waiting
            waiting, slope_mC = None, None
            if head.softcap:
                capped = (logits_mC / head.softcap).nan_to_num_(neginf=0.0)
                slope_mC = 1.0 - capped.square()
            delta_mC = logits_mC.sub_(lse_M[start:stop, None]).exp_().mul_(-total_M[start:stop, None])
            delta_mC.index_put_((row_Q[low:high] - start, column_Q[low:high]), gradient_Q[low:high], accumulate=True)
            if slope_mC is not None:
                delta_mC.mul_(slope_mC)
            gradient_MH[start:stop] = delta_mC.to(hidden_MH.dtype) @ head.weight_CH
        return gradient_MH, None, None, None


def _chunks(positions: int, chunk: int, row_Q: Tensor) -> Iterator[tuple[int, int, int]]:
    """(first position, first query, one past the last query) of each chunk."""
    starts = list(range(0, positions, chunk))
    edges = torch.searchsorted(row_Q, torch.tensor([*starts, positions], device=row_Q.device)).tolist()
    yield from zip(starts, edges[:-1], edges[1:], strict=True)
