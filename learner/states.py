"""From the policy's log-probs at the nodes of a prefix tree to u at the states of a group."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learner.losses import States
from system.prefix_tree import PrefixTree
from system.trajectory import Group


def node_log_reward(tree: PrefixTree, group: Group) -> np.ndarray:
    """Untempered log R float64 [N]; NaN where no trajectory knows one. Where a reward is noisy the first one's counts: fresh
    samples come before replayed ones."""
    log_reward_N = np.full(len(tree), np.nan)
    for nodes_T, log_reward_T in zip(reversed(tree.nodes_K), reversed(group.log_reward_K), strict=True):
        known = np.isfinite(log_reward_T)
        log_reward_N[nodes_T[known]] = log_reward_T[known]
    return log_reward_N


class NodeLogQ(NamedTuple):
    """What a policy says at the nodes of a prefix tree, nats."""

    edge_N: Tensor
    """Log q of the action that leads to a node; 0 at the root, where the policy had no choice, and where the environment wrote
    the token."""
    stop_N: Tensor
    """log q(stop | node) where it is wanted; 0 elsewhere, and where the stop is forced."""


def padded_paths(tree: PrefixTree) -> tuple[np.ndarray, np.ndarray]:
    """The nodes on each trajectory's path, the root first, int64 [K, T + 1], T the longest; and where they are, bool: the rest
    points at the root."""
    lengths_K = np.array([len(nodes_T) for nodes_T in tree.nodes_K])
    inside_KT = np.arange(lengths_K.max()) < lengths_K[:, None]
    node_KT = np.zeros(inside_KT.shape, np.int64)
    node_KT[inside_KT] = np.concatenate(tree.nodes_K)
    return node_KT, inside_KT


def states_of(tree: PrefixTree, log_reward_N: np.ndarray, log_q: NodeLogQ, temperature: float) -> States:
    """u(s) = log R(s) / T - log q(stop | s) - C(s) along every trajectory.

    Args:
        log_reward_N: untempered, nats, NaN where unknown.
        log_q: with that of the stop where log_reward_N is finite.
        temperature: T.
    """
    device = log_q.edge_N.device
    node_KT, inside_KT = padded_paths(tree)
    terminable_KT = inside_KT & np.isfinite(log_reward_N)[node_KT]
    places = np.flatnonzero(terminable_KT)
    distinct_KT = np.zeros_like(terminable_KT)
    distinct_KT.flat[places[np.unique(node_KT.flat[places], return_index=True)[1]]] = True

    nodes = torch.from_numpy(node_KT).to(device)
    log_reward = torch.from_numpy(np.nan_to_num(log_reward_N) / temperature).to(device, torch.float32)
    # Padding points at the root, whose edge adds 0 to the path.
    path_KT = log_q.edge_N[nodes].cumsum(1)
    u_KT = (log_reward - log_q.stop_N)[nodes] - path_KT
    terminable, distinct, end = (torch.from_numpy(a).to(device) for a in (terminable_KT, distinct_KT, inside_KT.sum(1) - 1))
    return States(u_KT, terminable, distinct, end)
