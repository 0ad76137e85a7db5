"""The arithmetic that an update cannot do without, and the most that a device does in a second: their ratio is its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from learner.learner import Learner
from system.prefix_tree import Packed, PrefixTree
from system.trajectory import Group
from tests.benchmarks.figures import seconds


def operations(learner: Learner, groups: Sequence[Group]) -> float:
    """Floating-point operations of a forward pass over each token once and of its gradients: those of the activations, and
    of LoRA's own weights, since the base is frozen. The output layer counts where something is predicted, and attention by
    the pairs that see each other; with all layers adapted."""
    model: Any = learner.policy.language_model.model
    config = model.config
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    frozen = [p for p in model.parameters() if p.ndim == 2 and not p.requires_grad and id(p) not in embeddings]
    layers, lora = sum(p.numel() for p in frozen), sum(p.numel() for p in learner.policy.parameters.values())
    head = len(learner.constraints.columns) * config.hidden_size
    tokens = nodes = pairs = 0
    for group in groups:
        piece = Packed.of(PrefixTree.of(group.trajectories_K), group.prompt.policy_tokens)
        tokens += len(piece)
        nodes += len(piece.tree)
        pairs += int((piece.end_L - np.arange(len(piece))).sum())
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Two products of a pair forward, four backward, two operations for each of the head's numbers.
    attention = 12.0 * pairs * config.num_attention_heads * head_size * config.num_hidden_layers
    return 4.0 * (layers * tokens + head * nodes) + 6.0 * lora * tokens + attention


def peak(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a large matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timed = seconds(lambda: (torch.mm(a, b), wait(device)))
    return 2.0 * side**3 / min(timed() for _ in range(10))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
