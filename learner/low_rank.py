"""x W^T + s (x A^T) B^T with W frozen, forward and backward, as few passes over large arrays as it takes.

PEFT's layer computes the second term in the precision of A and B, float32, as an array of the size of the first, scales it and
adds it. Beside a bfloat16 base that costs a float32 copy of x, kept for the backward pass, and more time than its arithmetic.
Here it is in the precision of x, as under autocast, scaled where it is [L, rank], and added by the product itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


class LowRankLinear(torch.autograd.Function):
    """`apply(x, weight_OI, bias_O, a_RI, b_OR, scale)`: [..., in] -> [..., out], in x's precision. Gradients are those of x,
    and of A and B in their own precision; `weight_OI` and `bias_O` (or None) have none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_LI, a, b = x.reshape(-1, x.shape[-1]), a_RI.to(x.dtype), b_OR.to(x.dtype)
        low_LR = (x_LI @ a.T).mul_(scale)
        y_LO = linear(x_LI, weight_OI, bias_O).addmm_(low_LR, b.T)
        ctx.save_for_backward(x_LI, weight_OI, a, b, low_LR)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a_RI.dtype, b_OR.dtype)
        return y_LO.view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x_LI, weight_OI, a_RI, b_OR, low_LR = ctx.saved_tensors
        y_LO = grad[0].reshape(-1, grad[0].shape[-1])
        grad_low_LR = (y_LO @ b_OR).mul_(ctx.scale)
        grad_a, grad_b = (grad_low_LR.T @ x_LI).to(ctx.dtypes[0]), (y_LO.T @ low_LR).to(ctx.dtypes[1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (y_LO @ weight_OI).addmm_(grad_low_LR, a_RI).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None
