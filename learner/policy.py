"""The policy q: the base model with a LoRA adapter, as log-probs at the nodes of prefix trees. The one home of peft."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from learner.low_rank import LowRankLinear
from learner.piece import Piece
from learner.ranks import Ranks
from learner.states import NodeLogQ
from system.config import ConfigError, Lora
from system.constraints import Constraints
from system.language_model import LanguageModel
from system.pretrained import load_pretrained


class LoraLinear(PeftLinear):
    """PEFT's layer, computed by `LowRankLinear` where the base is a plain linear layer, as quantised ones are not."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        if self.disable_adapters or type(base) is not torch.nn.Linear:
            return super().forward(x, *args, **kwargs)
        [name] = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return LowRankLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-any-return]


def outside(layers: int, share: float) -> str:
    """A regular expression of the names of all modules but those inside the last `share` of so many layers, rounded up.

    A layer's number is the first part of a name that is one, as 3 in model.layers.3.mlp.experts.0.up_proj.
    """
    kept = "|".join(map(str, range(layers - math.ceil(share * layers), layers)))
    return rf"(?!(?:[^.]*[^.\d][^.]*\.)*(?:{kept})\.).*"


class Policy:
    """Base + LoRA. The base is frozen; the LoRA weights are float32, and B = 0 at first, so q starts as the base.

    Raises:
        ConfigError: lora.targets names no linear module of the model, or none in the share of its layers that is adapted.
    """

    def __init__(
        self,
        folder: Path,
        lora: Lora,
        constraints: Constraints,
        *,
        dtype: torch.dtype,
        device: torch.device,
        logits_chunk: int = 256,
        gradient_checkpointing: bool = False,
        ranks: Ranks | None = None,
        attention: Literal["auto", "dense", "block"] = "auto",
    ) -> None:
        """With `ranks` the frozen layers are in shards over them: then every forward pass is one of all ranks."""
        # A base that fits no single device goes there layer by layer, as shards.
        base = load_pretrained(folder, dtype, torch.device("cpu") if ranks else device)
        targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
        peft_config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            target_modules=targets,
            # PEFT's layers_to_transform does not go with all-linear.
            exclude_modules=outside(base.config.get_text_config().num_hidden_layers, lora.layers) if lora.layers < 1 else None,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        # Private in PEFT, which has no other way; layers of other kinds stay PEFT's own.
        peft_config._register_custom_module({torch.nn.Linear: LoraLinear})
        try:
            self._peft: PeftModel = get_peft_model(base, peft_config, autocast_adapter_dtype=False)  # type: ignore[assignment]
        except ValueError as error:
            where = f" in the last lora.layers={lora.layers:g} of the layers" if lora.layers < 1 else ""
            raise ConfigError(f"lora.targets={lora.targets!r}{where}: {error}") from error
        for name, layer in (("output", base.get_output_embeddings()), ("input", base.get_input_embeddings())):
            if isinstance(layer, BaseTunerLayer):
                raise ConfigError(
                    f"lora.targets={lora.targets!r} adapts the {name} embeddings, which stay frozen here; "
                    "name linear modules inside the layers, or all-linear"
                )
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for name, parameter in self._peft.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                self.parameters[name] = parameter
        if ranks:
            ranks.shard(base.base_model, whole=set(self.parameters.values()))
            torch.nn.Module.to(base, device)
        if gradient_checkpointing:
            # Checkpointing acts in training mode alone; there is no dropout to be turned on by it.
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # Gradients of embeddings are for reentrant checkpoints; they would go back through layers that are not adapted.
            base.disable_input_require_grads()
            base.train()
        self.constraints = constraints
        self.scale = lora.alpha / lora.rank
        """What B A is multiplied with."""
        self.language_model = LanguageModel(base, logits_chunk, attention)

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    def log_q(self, pieces: Sequence[Piece]) -> list[NodeLogQ]:
        """Of pieces in one row, for each: float32, with gradients."""
        model, constraints = self.language_model, self.constraints
        hidden_LH = model.hidden([piece.packed for piece in pieces])
        positions, tokens, may_stop, wanted, offset = [], [], [], [], 0
        for piece in pieces:
            tree = piece.tree
            actions = np.flatnonzero(piece.chosen_N)
            stops = np.flatnonzero(piece.wanted_N & ~constraints.must_stop(tree.depth_N))
            at = np.concatenate([tree.parent_N[actions], stops])
            positions.append(piece.packed.start_N[at] + offset)
            tokens.append(np.concatenate([tree.token_N[actions], np.full(len(stops), constraints.stop_token)]))
            may_stop.append(piece.may_stop_N[at])
            wanted.append((actions, stops))
            offset += len(piece)
        log_q_Q = model.log_probs(
            hidden_LH, np.concatenate(positions), np.concatenate(tokens), constraints, np.concatenate(may_stop)
        )
        result, done = [], 0
        for piece, (actions, stops) in zip(pieces, wanted, strict=True):
            pair = []
            for nodes in (actions, stops):
                values = log_q_Q[done : done + len(nodes)]
                done += len(nodes)
                index = torch.from_numpy(nodes).to(self.device)
                pair.append(values.new_zeros(len(piece.tree)).index_put((index,), values))
            result.append(NodeLogQ(*pair))
        return result

    def log_q_in_parts(self, piece: Piece) -> NodeLogQ:
        """As `log_q` of the piece whole, a part at a time: the backward pass computes each again, so that what a part keeps for
        its gradient is there while that is computed, and no longer."""
        # The other kind of checkpoint would keep the logits that ChunkedLogProbs has for its backward pass, of every part; this
        # one needs an input that has a gradient.
        some = torch.zeros((), requires_grad=True)
        log_q = [
            checkpoint(lambda _, piece: self.log_q([piece])[0], some, part.piece, use_reentrant=True, preserve_rng_state=False)
            for part in piece.parts
        ]
        # A node that several parts have is one node, of the first of them.
        _, first_N = np.unique(np.concatenate([part.node_N for part in piece.parts]), return_index=True)
        index = torch.from_numpy(first_N).to(self.device)
        return NodeLogQ(*(torch.cat(values)[index] for values in zip(*log_q, strict=True)))

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the adapter is off and q is the base model."""
        with self._peft.disable_adapter():
            yield

    def adapter_tensors(self) -> dict[str, np.ndarray]:
        """The LoRA weights under PEFT's names, float32, on the host."""
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in get_peft_model_state_dict(self._peft).items()}

    def load_adapter(self, tensors: dict[str, np.ndarray]) -> None:
        """Takes LoRA weights under PEFT's names. Raises ValueError if they are of another model, rank, targets or layers."""
        own = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(self._peft).items()}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if own != given:
            differing = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise ValueError(f"the adapter does not fit the policy: {len(differing)} tensors differ, such as {differing[0]}")
        set_peft_model_state_dict(self._peft, {name: torch.from_numpy(array) for name, array in tensors.items()})

    def adapter_config(self) -> dict[str, Any]:
        """adapter_config.json of a PEFT folder."""
        config = self._peft.peft_config["default"].to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        plain["peft_type"], plain["task_type"], plain["inference_mode"] = "LORA", "CAUSAL_LM", True
        return {key: value for key, value in plain.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))
