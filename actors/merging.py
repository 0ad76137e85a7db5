"""Merged weights in a running vLLM model: W + scale * B A from the pristine base, one layer at a time.

vLLM keeps the projections of one input as rows of one weight (q, k and v; gate and up), and on CPU it replaces each weight
by a copy packed for its kernels. So a layer is put together in one buffer that stays in the processor's cache, and given
to vLLM's own packing. vLLM's `reload_weights` does the same through fresh copies of every layer, and takes 3 times as long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from system.adapters import AdapterError, BaseWeights, LoraUpdate


@dataclass(frozen=True)
class _Part:
    """The rows of a layer's weight that one weight of the checkpoint fills."""

    name: str
    rows: slice


@dataclass(frozen=True)
class _Layer:
    module: Any
    """vLLM's linear layer."""
    parts: tuple[_Part, ...]
    transposed: bool
    """The checkpoint stores [in, out]."""
    shape: tuple[int, int]
    """[out, in]."""


class Merging:
    """Writes versions into `model`, vLLM's own. A layer that a version leaves alone goes back to the base."""

    def __init__(self, model: nn.Module, base: BaseWeights, rounding: Literal["nearest", "stochastic"] = "stochastic") -> None:
        self._modules = dict(model.named_modules())
        self._fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._base = base
        self._layers: dict[str, _Layer] = {}
        self._buffer = torch.empty(0)
        self._stochastic = rounding == "stochastic" and self._dtype == torch.bfloat16
        self._noise = torch.empty(0, dtype=torch.int32)

    def check(self, updates: Mapping[str, LoraUpdate]) -> None:
        """Finds the layers of `updates`, which are named by the weights of the checkpoint.

        Raises:
            AdapterError: vLLM keeps one of them in a form that this does not know.
        """
        for name, update in updates.items():
            path, parts = self._find(name)
            if path not in self._layers:
                shapes = [self._base.shapes[part.name] for part in parts]
                rows, columns = (1, 0) if update.transposed else (0, 1)
                shape = (sum(shape[rows] for shape in shapes), shapes[0][columns])
                self._layers[path] = _Layer(self._modules[path], parts, update.transposed, shape)

    def write(self, updates: Mapping[str, LoraUpdate]) -> float:
        """Makes the model base + `updates`, which `check` has seen.

        Returns the effective update: the cosine between what was added to the first layer and what the model's precision
        kept of it. 1 is all; bfloat16 rounds small updates away. NaN where nothing was added.
        """
        effective = math.nan
        with torch.no_grad():
            for index, layer in enumerate(self._layers.values()):
                base_OI = self._merged(layer, {}).clone() if index == 0 else None
                merged_OI = self._merged(layer, updates)
                if base_OI is not None:
                    effective = self._effective(base_OI, merged_OI)
                self._put(layer, merged_OI)
        return effective

    def _effective(self, base_OI: torch.Tensor, merged_OI: torch.Tensor) -> float:
        wanted_OI, kept_OI = merged_OI - base_OI, self._rounded(merged_OI).float() - self._rounded(base_OI).float()
        lengths = float(wanted_OI.norm() * kept_OI.norm())
        if not float(wanted_OI.norm()):
            return math.nan
        return float((wanted_OI * kept_OI).sum()) / lengths if lengths else 0.0

    def _find(self, name: str) -> tuple[str, tuple[_Part, ...]]:
        """The layer that holds a checkpoint's weight, and all that it is made of."""
        module = name.removesuffix(".weight")
        parent, _, leaf = module.rpartition(".")
        whole = {leaf: [leaf]} | {fused: leaves for fused, leaves in self._fused.items() if leaf in leaves}
        for own, leaves in whole.items():
            wanted = f"{parent}.{own}"
            path = next((path for path in self._modules if path == wanted or path.endswith(f".{wanted}")), None)
            if path is None or type(getattr(self._modules[path], "quant_method", None)).__name__ != "UnquantizedLinearMethod":
                continue
            parts, start = [], 0
            for each in leaves:
                weight = f"{parent}.{each}.weight"
                if len(leaves) > 1 and weight not in self._base.shapes:
                    break
                # A transposed weight is alone in its layer: all rows are its own.
                stop = start + self._base.shapes[weight][0]
                parts.append(_Part(weight, slice(start, stop) if len(leaves) > 1 else slice(None)))
                start = stop
            else:
                return path, tuple(parts)
        raise AdapterError(f"vLLM keeps {name!r} in a form that cannot be merged into; set sampler.install=adapter")

    def _merged(self, layer: _Layer, updates: Mapping[str, LoraUpdate]) -> torch.Tensor:
        """float32 [out, in], in a buffer that the next layer overwrites."""
        size = layer.shape[0] * layer.shape[1]
        if len(self._buffer) < size:
            self._buffer = torch.empty(size)
        merged_OI = self._buffer[:size].view(layer.shape)
        for part in layer.parts:
            rows_OI, weight = merged_OI[part.rows], self._base.tensor(part.name)
            rows_OI.copy_(weight.T if layer.transposed else weight)
            if (update := updates.get(part.name)) is not None:
                rows_OI.addmm_(torch.from_numpy(update.b_OR), torch.from_numpy(update.a_RI), alpha=update.scale)
        return merged_OI

    def _rounded(self, merged_OI: torch.Tensor) -> torch.Tensor:
        """In the model's precision.

        bfloat16 is the upper half of a float32. Noise is added to the lower half, which is then cut off, so a weight goes
        up in proportion to its lower half and an update arrives on average. A weight has the same noise in every version
        and in every engine: what bfloat16 can hold stays as it is, and a version is the same policy everywhere.
        """
        if not self._stochastic:
            return merged_OI.to(self._dtype)
        if len(self._noise) < merged_OI.numel():
            largest = max(math.prod(layer.shape) for layer in self._layers.values())
            self._noise = torch.randint(1 << 16, (largest,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
        bits = merged_OI.view(torch.int32) + self._noise[: merged_OI.numel()].view(merged_OI.shape)
        return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)

    def _put(self, layer: _Layer, merged_OI: torch.Tensor) -> None:
        module = layer.module
        if module.weight.numel():
            module.weight.data.copy_(self._rounded(merged_OI))
            return
        # vLLM packed the weight and dropped it. Without the packed copy of the version before, its memory is used again.
        module.cpu_linear = None
        module.weight = nn.Parameter(self._rounded(merged_OI), requires_grad=False)
        module.quant_method.process_weights_after_loading(module)
        if module.weight.numel():
            raise RuntimeError(f"vLLM did not pack the weight of {layer.parts[0].name!r} again")
