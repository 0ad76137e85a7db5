"""LoRA's layer as one operation, against the sum that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from learner.low_rank import LowRankLinear

SCALE = 2.5


def inputs(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(x, W, bias, A, B), of which x, A and B want gradients; A and B are float32 beside a bfloat16 base, as a policy's are."""
    torch.manual_seed(0)
    trained = torch.float32 if dtype == torch.bfloat16 else dtype
    x, weight, offset = (torch.randn(shape, dtype=dtype) for shape in ((2, 5, 7), (6, 7), (6,)))
    a, b = (torch.randn(shape, dtype=trained).requires_grad_() for shape in ((3, 7), (6, 3)))
    return x.requires_grad_(), weight, offset if bias else None, a, b


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return linear(x, weight, bias) + SCALE * linear(linear(x.to(a.dtype), a), b).to(x.dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_sum(bias: bool) -> None:
    x, weight, offset, a, b = inputs(torch.float64, bias)
    torch.testing.assert_close(LowRankLinear.apply(x, weight, offset, a, b, SCALE), plain(x, weight, offset, a, b))
    assert torch.autograd.gradcheck(lambda x, a, b: LowRankLinear.apply(x, weight, offset, a, b, SCALE), (x, a, b))


def test_an_input_that_wants_no_gradient_has_none() -> None:
    x, weight, offset, a, b = inputs(torch.float64)
    x = x.detach()
    assert torch.autograd.gradcheck(lambda a, b: LowRankLinear.apply(x, weight, offset, a, b, SCALE), (a, b))


def test_beside_a_bfloat16_base_gradients_come_in_the_precision_of_the_weights() -> None:
    x, weight, offset, a, b = inputs(torch.bfloat16)
    y = LowRankLinear.apply(x, weight, offset, a, b, SCALE)
    found = torch.autograd.grad(y.float().square().sum(), (x, a, b))
    expected = torch.autograd.grad(plain(x, weight, offset, a, b).float().square().sum(), (x, a, b))
    assert y.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(found, expected, strict=True):
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 0.01
