"""The policy's layers: LoRA as one operation where that is known, and everywhere what PEFT's own layers compute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer

from learner.policy import LoraLinear, Policy, outside
from system.config import ConfigError, Lora
from system.constraints import Constraints
from tests import tiny
from tests.test_language_model import VOCAB
from tests.test_tree_attention import CPU, log_q, trained

CONSTRAINTS = Constraints.of(stop_token=4, min_tokens=0, max_tokens=20, vocab_size=VOCAB)


def policy_of(folder: Path, dtype: torch.dtype = torch.float32, *, checkpointing: bool = False, layers: float = 1.0) -> Policy:
    torch.manual_seed(0)
    lora = Lora(rank=4, layers=layers)
    policy = Policy(folder, lora, CONSTRAINTS, dtype=dtype, device=CPU, gradient_checkpointing=checkpointing)
    tiny.perturb(policy.parameters.values())
    return policy


@pytest.mark.parametrize(("kind", "ours"), [("llama", True), ("gpt2", False)])
def test_layers_that_are_linear_are_one_operation_and_others_are_pefts(tmp_path: Path, kind: str, ours: bool) -> None:
    model = policy_of(tiny.folder(tmp_path, kind, VOCAB)).language_model.model
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert adapted
    assert all(isinstance(module, LoraLinear) is ours for module in adapted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_q_and_gradients_are_those_of_pefts_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    folder = tiny.folder(tmp_path, kind, VOCAB)
    found = trained(policy_of(folder, dtype, checkpointing=checkpointing))
    monkeypatch.setattr(LoraLinear, "forward", Linear.forward)
    expected = trained(policy_of(folder, dtype, checkpointing=checkpointing))
    for ours, pefts in zip(found, expected, strict=True):
        assert float((ours - pefts).norm() / pefts.norm()) < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_a_share_of_the_layers_are_the_last_ones_with_the_gradients_that_they_have_among_all(
    tmp_path: Path, kind: str, checkpointing: bool
) -> None:
    """Of two layers; the first of the policy that has both is as in the base."""
    folder = tiny.folder(tmp_path, kind, VOCAB)
    part, whole = (policy_of(folder, checkpointing=checkpointing, layers=layers) for layers in (0.5, 1.0))
    first = {name for name in whole.parameters if re.search(r"\D\.0\.", name)}
    assert 0 < len(first) < len(whole.parameters)
    assert part.parameters.keys() == whole.parameters.keys() - first
    with torch.no_grad():
        for name, parameter in whole.parameters.items():
            parameter.copy_(part.parameters[name] if name in part.parameters else torch.zeros(()))
    outputs: list[torch.Tensor] = []
    for name, module in part.language_model.model.named_modules():
        if re.search(r"\D\.0$", name):
            module.register_forward_hook(lambda module, given, result: outputs.append(result))
    torch.testing.assert_close(trained(part)[0], trained(whole)[0])
    for name, parameter in part.parameters.items():
        torch.testing.assert_close(parameter.grad, whole.parameters[name].grad)
    [output] = outputs
    assert not output.requires_grad, "an update goes back through a layer that has no adapter"


@pytest.mark.parametrize(("share", "first"), [(0.01, 11), (0.34, 7), (0.5, 6), (0.99, 0)])
@pytest.mark.parametrize(
    "name",
    ["model.layers.{}.mlp.up_proj", "transformer.h.{}.attn.c_attn", "model.language_model.layers.{}.self_attn.q_proj",
     "layers.{}.mlp.experts.0.up_proj", "model.decoder2.layers.{}.fc1"],
)  # fmt: skip
def test_the_layers_that_are_adapted_are_the_last_ones_of_any_model(name: str, share: float, first: int) -> None:
    adapted = [layer for layer in range(12) if not re.fullmatch(outside(12, share), name.format(layer))]
    assert adapted == list(range(first, 12))
    assert re.fullmatch(outside(12, share), "model.decoder.project_in")


def test_targets_that_the_last_layers_have_not_are_named_with_their_share(tmp_path: Path) -> None:
    lora = Lora(rank=4, targets=("layers.0.mlp.up_proj",), layers=0.5)
    message = r"lora.targets=\('layers.0.mlp.up_proj',\) in the last lora.layers=0.5 of the layers: "
    with pytest.raises(ConfigError, match=message):
        Policy(tiny.folder(tmp_path, "llama", VOCAB), lora, CONSTRAINTS, dtype=torch.float32, device=CPU)


def test_without_the_adapter_q_is_the_base(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path, "llama", VOCAB)
    policy = policy_of(folder)
    base = Policy(folder, Lora(rank=4), CONSTRAINTS, dtype=torch.float32, device=CPU)  # B = 0
    with torch.no_grad(), policy.base():
        torch.testing.assert_close(log_q(policy), log_q(base))
    assert not torch.allclose(log_q(policy), log_q(base))


def test_a_base_layer_of_another_kind_computes_for_itself(tmp_path: Path) -> None:
    """As quantised layers, whose weight is not what a product takes."""

    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    policy = policy_of(tiny.folder(tmp_path, "llama", VOCAB))
    layer = next(module for module in policy.language_model.model.modules() if isinstance(module, LoraLinear))
    linear = layer.base_layer
    assert isinstance(linear, torch.nn.Linear)
    x = torch.randn(3, linear.in_features)
    with torch.no_grad():
        plain, base = layer(x), linear(x)
        linear.__class__ = Doubled
        torch.testing.assert_close(layer(x), plain + base)


def test_the_scale_of_the_update_is_alpha_over_rank(tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=12)
    policy = Policy(tiny.folder(tmp_path), lora, CONSTRAINTS, dtype=torch.float32, device=CPU)
    layers: list[Any] = [module for module in policy.language_model.model.modules() if isinstance(module, BaseTunerLayer)]
    assert {layer.scaling["default"] for layer in layers} == {policy.scale} == {3.0}
