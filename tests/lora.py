"""Adapters for tiny models made with PEFT, and the behaviour's log-probs from their definition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from deploy.pool import RaySamplers
from system.adapters import Adapter, Canary
from system.constraints import Constraints
from system.trajectory import Behaviour, Prompt, Request, Trajectory

NAME = "tiny"
"""What adapters call their base model."""
CANARY = tuple(range(10, 50, 2))
TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "v_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
"""Of llama, a part of each fused group: q and v of qkv, up of gate and up."""


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False).eval()


def adapted(path: Path, targets: Sequence[str], seed: int, scale: float = 0.2) -> PeftModel:
    """The model with random LoRA weights of rank 4; with scale 0 it is the base."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(load(path), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, scale)
    return model.eval()  # type: ignore[return-value]


def token_log_probs(model: torch.nn.Module, tokens: Sequence[int]) -> np.ndarray:
    """float64 [T - 1]: log p of each token but the first, given those before it."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)])).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(list(tokens[1:]))[:, None])[:, 0].numpy()


def publish(version: int, model: PeftModel, canary: Sequence[int] = CANARY) -> Adapter:
    """The adapter as a learner publishes it, with a true canary."""
    tensors = {name: tensor.numpy() for name, tensor in get_peft_model_state_dict(model).items()}
    config = {
        key: sorted(value) if isinstance(value, set) else value for key, value in model.peft_config["default"].to_dict().items()
    }
    with model.disable_adapter():
        base = token_log_probs(model, canary)
    proof = Canary(tuple(canary), tuple(token_log_probs(model, canary)), tuple(base))
    return Adapter.of(version, version, tensors, config | {"base_model_name_or_path": NAME}, NAME, proof)


def next_log_probs(
    model: torch.nn.Module,
    constraints: Constraints,
    prompt: Prompt,
    tokens_T: np.ndarray,
    behaviour: Behaviour,
    is_action_T: np.ndarray | None = None,
) -> torch.Tensor:
    """float64 [T + 1, V]: log of (1 - eps) softmax(logits / temperature) + eps uniform, over the support at each depth."""
    context = [*prompt.policy_tokens, *tokens_T.tolist()]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context])).logits[0, len(prompt.policy_tokens) - 1 :].double()
    return _behaved(logits, constraints, tokens_T, behaviour, is_action_T)


def _behaved(
    logits: torch.Tensor,
    constraints: Constraints,
    tokens_T: np.ndarray,
    behaviour: Behaviour,
    is_action_T: np.ndarray | None = None,
) -> torch.Tensor:
    depth = np.cumsum(np.append(0, np.ones(len(tokens_T)) if is_action_T is None else is_action_T))
    support = torch.zeros(logits.shape, dtype=torch.bool)
    support[:, constraints.columns] = True
    support[torch.from_numpy(depth < max(constraints.min_tokens, behaviour.open_from)), constraints.stop_token] = False
    for t in range(len(tokens_T) + 1) if constraints.required else ():
        may_stop, certain = constraints.after(tokens_T[:t].tolist())
        support[t, constraints.stop_token] &= may_stop
        if certain is not None:
            support[t] = torch.arange(support.shape[1]) == certain
    probs = (logits / behaviour.temperature).masked_fill(~support, -torch.inf).softmax(-1)
    return ((1 - behaviour.epsilon) * probs + behaviour.epsilon * support / support.sum(-1, keepdim=True)).log()


def log_probs_across(
    before: torch.nn.Module,
    after: torch.nn.Module,
    constraints: Constraints,
    prompt: Prompt,
    trajectory: Trajectory,
    drawn: int,
) -> np.ndarray:
    """float64 [T + 1], of actions alone: as `drawn_log_probs`, where `drawn` tokens were drawn from one model, and the others
    from another one over the keys and values that the first had computed by then."""
    context = torch.tensor([[*prompt.policy_tokens, *trajectory.tokens_T.tolist()]])
    read = len(prompt.policy_tokens) + drawn - 1
    with torch.no_grad():
        first = before(input_ids=context[:, :read], use_cache=True)
        second = after(input_ids=context[:, read:], past_key_values=first.past_key_values) if read < context.shape[1] else None
    logits = torch.cat([part.logits[0] for part in (first, second) if part is not None])[len(prompt.policy_tokens) - 1 :]
    logp = _behaved(logits.double(), constraints, trajectory.tokens_T, trajectory.behaviour)
    tokens = [*trajectory.tokens_T.tolist(), constraints.stop_token]
    result = logp[torch.arange(len(tokens)), tokens].numpy()
    if trajectory.stop == "forced":
        result[-1] = 0.0
    return result


def drawn_log_probs(model: torch.nn.Module, constraints: Constraints, prompt: Prompt, trajectory: Trajectory) -> np.ndarray:
    """float64 [T + 1]: what `Trajectory.logp_T` has to be."""
    is_action_T = trajectory.is_action_T
    logp = next_log_probs(model, constraints, prompt, trajectory.tokens_T, trajectory.behaviour, is_action_T)
    drawn = [*trajectory.tokens_T.tolist(), constraints.stop_token]
    result = logp[torch.arange(len(drawn)), drawn].numpy()
    if trajectory.stop == "forced":
        result[-1] = 0.0
    result[:-1][~is_action_T] = 0.0
    certain = [constraints.after(trajectory.tokens_T[:depth].tolist())[1] is not None for depth in range(len(trajectory))]
    planted = [depth for depth, _ in trajectory.behaviour.planted if depth < len(trajectory) and not certain[depth]]
    result[planted] = 0.0
    return result


def installed_by(samplers: RaySamplers, adapter: Any, request: Request) -> list[dict[str, float]]:
    """The stats of each sampler of a pool once it has drawn a group under the adapter, to which there is a reference."""

    def stats(actor: Any, adapter: Adapter) -> dict[str, float]:
        actor.part.sample(request, adapter)
        return actor.part.stats()

    return ray.get([actor.__ray_call__.remote(stats, adapter) for actor in samplers.named().values()])
