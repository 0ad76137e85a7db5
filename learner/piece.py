"""A group's prefix tree as it goes into a row, with what the policy may do at its nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from system.constraints import Constraints
from system.prefix_tree import Packed, PrefixTree, split
from system.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Piece:
    packed: Packed
    may_stop_N: np.ndarray
    """bool: the stop is in the support there."""
    chosen_N: np.ndarray
    """bool: the policy chose the token that leads to the node."""
    wanted_N: np.ndarray
    """bool: log q of the stop there is asked for."""

    def __len__(self) -> int:
        """Tokens to be computed."""
        return len(self.packed)

    @property
    def tree(self) -> PrefixTree:
        return self.packed.tree

    @classmethod
    def of(cls, tree: PrefixTree, context: Sequence[int], constraints: Constraints, wanted_N: np.ndarray) -> Piece:
        may_stop_N, chosen_N = constraints.of_tree(tree)
        return cls(Packed.of(tree, context), may_stop_N, chosen_N, wanted_N & may_stop_N)


@dataclass(frozen=True, eq=False)
class Part:
    """Neighbouring samples of a group that is too long for one row, with its prompt.

    A loss is of the whole group, and so of log q at all its nodes. These are computed part by part, without gradients; the loss
    says how it changes with each of them; and each part, computed once more, hands that on to the weights. The gradient is that
    of one row, for one more forward pass.
    """

    piece: Piece
    node_N: np.ndarray
    """int64: its nodes in the whole tree."""
    first_N: np.ndarray
    """bool: no part before has the node."""


def longest_row(context: Sequence[int], budget: int) -> int:
    """Most tokens of a part: where the prompt fills the budget, as many tokens of samples as it has all the same, or it would
    be read for nearly every sample."""
    return max(budget, 2 * len(context))


def cut(piece: Piece, trajectories_K: Sequence[Trajectory], context: Sequence[int], budget: int) -> list[Part]:
    """Parts of at most `longest_row` tokens, or of a single sample; `piece` is of the same trajectories and context."""
    limit = longest_row(context, budget) - len(context) + 1
    parts, seen_N = [], np.zeros(len(piece.tree), bool)
    for tree, members in split(trajectories_K, lambda tree: len(tree) <= limit):
        node_N = np.zeros(len(tree), np.int64)
        for nodes_T, k in zip(tree.nodes_K, members, strict=True):
            node_N[nodes_T] = piece.tree.nodes_K[k]
        own = (values_N[node_N] for values_N in (piece.may_stop_N, piece.chosen_N, piece.wanted_N))
        parts.append(Part(Piece(Packed.of(tree, context), *own), node_N, ~seen_N[node_N]))
        seen_N[node_N] = True
    return parts
