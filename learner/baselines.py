"""Baselines in the same loop: policy gradients, which maximise E[log R / T] where the losses match a distribution, and MLE.

Pure functions of the log-probs of a group's actions. Policy gradients need samples of the policy itself (a few versions
old at most), so neither replay nor exploration; the config refuses both. MLE is given demonstrations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learner.states import NodeLogQ, padded_paths
from system.learner_config import GRPO, MLE, PPO, RLOO, Loss
from system.prefix_tree import PrefixTree
from system.trajectory import Group

TRUNCATION = 2.0
"""Of the weights of RLOO's samples."""


@dataclass(frozen=True, eq=False)
class Actions:
    """The actions of one group, the stop last, along its K trajectories; T is the longest."""

    log_q_KT: Tensor
    """float [K, T + 1], nats, with gradients; 0 where there is no action (padding, a tool's token, what was certain)."""
    log_drawn_KT: Tensor
    """The same under the policy that drew them."""
    log_base_KT: Tensor | None
    """The same under the base model, for the KL penalty."""
    action_KT: Tensor
    """bool [K, T + 1]."""
    reward_K: Tensor
    """float [K]: log R / T of the whole trajectory, nats."""


class Baseline(NamedTuple):
    loss: Callable[[Actions], Tensor]
    needs_base: bool = False
    """Log-probs of the base model too, for a KL penalty."""


def build(section: Loss) -> Baseline | None:
    """The baseline of a config section `loss`; None for a GFlowNet loss."""
    match section:
        case GRPO(clip=clip, kl=kl):
            return Baseline(lambda actions: grpo(actions, clip, kl), kl > 0)
        case PPO(clip=clip, kl=kl):
            return Baseline(lambda actions: ppo(actions, clip, kl), kl > 0)
        case RLOO(kl=kl):
            return Baseline(lambda actions: rloo(actions, kl), kl > 0)
        case MLE():
            return Baseline(mle)
        case _:
            return None


def actions_of(
    tree: PrefixTree,
    chosen_N: np.ndarray,
    group: Group,
    log_q: NodeLogQ,
    base: NodeLogQ | None,
    temperature: float,
) -> Actions:
    """From log-probs at the nodes of the group's tree; arguments as in `learner.states.states_of`, and `chosen_N` as
    `Constraints.of_tree` has it."""
    device = log_q.edge_N.device
    node_KT, inside_KT = padded_paths(tree)
    stop_KT = np.arange(node_KT.shape[1]) == inside_KT.sum(1)[:, None] - 1
    # The action at t leads to the path's node t + 1; the last one is the stop, at the path's last node.
    node_KT = np.where(stop_KT, node_KT, np.roll(node_KT, -1, 1))
    sampled_K = np.array([trajectory.stop == "sampled" for trajectory in group.trajectories_K])
    action_KT = inside_KT & np.where(stop_KT, sampled_K[:, None], chosen_N[node_KT])
    drawn_KT = np.zeros(node_KT.shape, np.float32)
    drawn_KT[inside_KT] = np.concatenate([trajectory.logp_T for trajectory in group.trajectories_K])
    nodes, stops, actions = (torch.from_numpy(array).to(device) for array in (node_KT, stop_KT, action_KT))

    def along(edge_N: Tensor, stop_N: Tensor) -> Tensor:
        return torch.where(actions, torch.where(stops, stop_N[nodes], edge_N[nodes]), 0.0)

    reward_K = torch.from_numpy(group.end_log_reward_K / temperature).float()
    drawn = torch.from_numpy(drawn_KT).to(device)
    return Actions(
        along(*log_q),
        torch.where(actions, drawn, 0.0),
        None if base is None else along(*base).detach(),
        actions,
        reward_K.to(device),
    )


def grpo(actions: Actions, clip: float, kl: float) -> Tensor:
    """Clipped ratios, advantages standardised within the group, each trajectory's mean over its actions.

    Source: Shao et al. 2024, arXiv:2402.03300, Eq. 3, with its estimator of KL(q || base).
    """
    gain_KT = _clipped_gain(actions, _standardised(actions.reward_K), clip)
    if kl:
        assert actions.log_base_KT is not None
        away_KT = actions.log_base_KT - actions.log_q_KT
        gain_KT = gain_KT - kl * (away_KT.exp() - away_KT - 1)
    count_K = actions.action_KT.sum(1).clamp(min=1)
    return -((gain_KT * actions.action_KT).sum(1) / count_K).mean()


def rloo(actions: Actions, kl: float) -> Tensor:
    """REINFORCE on whole trajectories; the others of the group are the baseline, the KL is part of the reward.

    Samples that an earlier policy drew weigh q over theirs, at most TRUNCATION (Ionides 2008).
    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """
    reward_K = _reward_with_kl(actions, kl)
    others_K = (reward_K.sum() - reward_K) / (len(reward_K) - 1)
    ratio_K = (actions.log_q_KT - actions.log_drawn_KT).sum(1).detach().exp().clamp(max=TRUNCATION)
    return -(ratio_K * (reward_K - others_K) * actions.log_q_KT.sum(1)).mean()


def ppo(actions: Actions, clip: float, kl: float) -> Tensor:
    """Clipped ratios, the mean over all actions of the group; the KL is part of the reward, which is standardised.

    The group stands in for a critic: its mean is the baseline of every action. One epoch over each batch. A spread below 1 nat
    is left as it is: of equal rewards only the KL would be left, and scaled up to the same size whatever its weight.
    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7, with the reward of Ouyang et al. 2022, arXiv:2203.02155.
    """
    gain_KT = _clipped_gain(actions, _standardised(_reward_with_kl(actions, kl), least=1.0), clip)
    return -(gain_KT * actions.action_KT).sum() / actions.action_KT.sum().clamp(min=1)


def _reward_with_kl(actions: Actions, kl: float) -> Tensor:
    if not kl:
        return actions.reward_K
    assert actions.log_base_KT is not None
    return actions.reward_K - kl * (actions.log_q_KT.detach() - actions.log_base_KT).sum(1)


def _standardised(reward_K: Tensor, least: float = 0.0) -> Tensor:
    """Less the mean, over the standard deviation, which counts as `least` where it is smaller."""
    return (reward_K - reward_K.mean()) / (reward_K.std().clamp(min=least) + 1e-4)


def _clipped_gain(actions: Actions, advantage_K: Tensor, clip: float) -> Tensor:
    ratio_KT = (actions.log_q_KT - actions.log_drawn_KT).exp()
    return torch.minimum(ratio_KT * advantage_K[:, None], ratio_KT.clamp(1 - clip, 1 + clip) * advantage_K[:, None])


def mle(actions: Actions) -> Tensor:
    """Supervised fine-tuning: minus the mean log q of an action, the stop included, nats."""
    return -actions.log_q_KT.sum() / actions.action_KT.sum().clamp(min=1)
