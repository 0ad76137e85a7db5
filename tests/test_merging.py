"""What merging keeps of an update, on a stand-in for vLLM's model; tests/test_engine.py has the real one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from actors.merging import Merging
from system.adapters import BaseWeights, LoraUpdate

OUT, IN = 96, 64


class UnquantizedLinearMethod:
    """vLLM's method is known by its name; this one never packs."""


def merging(
    folder: Path, dtype: torch.dtype, rounding: Literal["nearest", "stochastic"] = "nearest"
) -> tuple[Merging, nn.Linear]:
    torch.manual_seed(0)
    save_file({"block.up.weight": torch.randn(OUT, IN).bfloat16()}, folder / "model.safetensors")
    model = nn.Module()
    model.block = nn.Module()
    layer = nn.Linear(IN, OUT, bias=False, dtype=dtype)
    layer.quant_method = UnquantizedLinearMethod()  # type: ignore[assignment]
    model.block.up = layer
    return Merging(model, BaseWeights(folder), rounding), layer


def update(scale: float) -> dict[str, LoraUpdate]:
    rng = np.random.default_rng(0)
    a_RI, b_OR = (rng.normal(size=shape).astype(np.float32) for shape in ((4, IN), (OUT, 4)))
    return {"block.up.weight": LoraUpdate(a_RI, b_OR, scale, transposed=False)}


def write(subject: Merging, updates: dict[str, LoraUpdate]) -> float:
    subject.check(updates)
    return subject.write(updates)


def test_the_weight_is_the_base_with_the_update_each_time_anew(tmp_path: Path) -> None:
    subject, layer = merging(tmp_path, torch.float32)
    base = BaseWeights(tmp_path).tensor("block.up.weight").float()
    for scale in (0.5, -0.25):
        one = update(scale)
        assert write(subject, one) == pytest.approx(1.0, abs=1e-5)
        added = scale * torch.from_numpy(one["block.up.weight"].b_OR @ one["block.up.weight"].a_RI)
        torch.testing.assert_close(layer.weight.data, base + added)
    assert math.isnan(write(subject, {}))
    torch.testing.assert_close(layer.weight.data, base, rtol=0, atol=0)


def test_bfloat16_keeps_large_updates_and_loses_small_ones(tmp_path: Path) -> None:
    subject, _ = merging(tmp_path, torch.bfloat16)
    kept = [write(subject, update(scale)) for scale in (1.0, 1e-3, 1e-5)]
    assert kept[0] > 0.99
    assert 0.2 < kept[1] < 0.98
    assert kept[2] < 0.3
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize(("rounding", "arrives"), [("nearest", False), ("stochastic", True)])
def test_small_updates_arrive_on_average_with_stochastic_rounding_alone(
    tmp_path: Path, rounding: Literal["nearest", "stochastic"], arrives: bool
) -> None:
    subject, layer = merging(tmp_path, torch.bfloat16, rounding)
    base = BaseWeights(tmp_path).tensor("block.up.weight").float()
    one = update(1e-4)
    write(subject, one)
    wanted = 1e-4 * torch.from_numpy(one["block.up.weight"].b_OR @ one["block.up.weight"].a_RI)
    kept = layer.weight.data.float() - base
    for away_from_zero in (True, False):
        chosen = (wanted * base > 0) == away_from_zero
        share = float((wanted * kept)[chosen].sum() / wanted[chosen].square().sum())
        assert share == pytest.approx(1.0, abs=0.3) if arrives else share < 0.5
    # The same version is the same weights, whatever came between, and what the base holds exactly comes back.
    first = layer.weight.data.clone()
    write(subject, {})
    torch.testing.assert_close(layer.weight.data.float(), base, rtol=0, atol=0)
    write(subject, one)
    torch.testing.assert_close(layer.weight.data, first, rtol=0, atol=0)
