"""A group too long for one row, as parts that are not: neighbouring samples, each with the prompt. NumPy only.

A loss is of the whole group, and so of log q at all its nodes. These are computed part by part, without gradients; the loss
says how it changes with each of them; and each part, computed once more, hands that on to the weights. The gradient is that of
one row, for one more forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from system.prefix_tree import Packed, PrefixTree, split
from system.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Part:
    """N nodes of its own tree."""

    packed: Packed
    node_N: np.ndarray
    """int64: the node of the whole tree."""
    first_N: np.ndarray
    """bool: no part before has it."""


def longest_row(context: Sequence[int], budget: int) -> int:
    """Most tokens of a part: where the prompt fills the budget, as many tokens of samples as it has all the same, or it would
    be read for nearly every sample."""
    return max(budget, 2 * len(context))


def cut(tree: PrefixTree, trajectories_K: Sequence[Trajectory], context: Sequence[int], budget: int) -> list[Part]:
    """Parts of at most `longest_row` tokens, or of a single sample. `tree` is that of the trajectories."""
    limit = longest_row(context, budget) - len(context) + 1
    parts, seen = [], np.zeros(len(tree), bool)
    for subtree, members in split(trajectories_K, lambda subtree: len(subtree) <= limit):
        node_N = np.zeros(len(subtree), np.int64)
        for nodes_T, k in zip(subtree.nodes_K, members, strict=True):
            node_N[nodes_T] = tree.nodes_K[k]
        parts.append(Part(Packed.of(subtree, context), node_N, ~seen[node_N]))
        seen[node_N] = True
    return parts
