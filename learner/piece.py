"""A group's prefix tree as it goes into a row, or into several, with what the policy may do at its nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    parts: tuple[Part, ...] = ()
    """Of a group that is too long for one row; they have all its nodes."""

    def __len__(self) -> int:
        """Tokens of it in one row."""
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
    """Neighbouring samples of a group, with its prompt."""

    piece: Piece
    node_N: np.ndarray
    """int64: its nodes in the whole tree."""


def cut(piece: Piece, trajectories_K: Sequence[Trajectory], context: Sequence[int], budget: int) -> Piece:
    """The piece, in parts of at most `budget` tokens, or of a single path, if it is longer. It is of these trajectories and
    this context."""
    # A prompt that fills the budget would be read for nearly every sample: they have as many tokens as it has all the same.
    longest = max(budget, 2 * len(context))
    if len(piece) <= longest:
        return piece
    parts = []
    for tree, members in split(trajectories_K, lambda tree: len(context) - 1 + len(tree) <= longest):
        node_N = np.zeros(len(tree), np.int64)
        for nodes_T, k in zip(tree.nodes_K, members, strict=True):
            node_N[nodes_T] = piece.tree.nodes_K[k]
        own = Piece(Packed.of(tree, context), piece.may_stop_N[node_N], piece.chosen_N[node_N], piece.wanted_N[node_N])
        parts.append(Part(own, node_N))
    return replace(piece, parts=tuple(parts)) if len(parts) > 1 else piece
