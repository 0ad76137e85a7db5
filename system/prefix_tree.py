"""The samples of one prompt as a prefix tree, and trees packed into rows. NumPy only.

The states of the GFlowNet are the nodes: two samples that begin alike share them, and each is computed once. Nodes are
numbered in depth-first preorder, so the descendants of node n are exactly n + 1 .. end_N[n] - 1, and one integer per
node, where its subtree ends, holds the whole attention pattern: key k is visible to query q iff k <= q < end[k].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from system.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Node 0 is the root, the empty prefix; N counts it."""

    token_N: np.ndarray
    """int64: the token that leads to a node. -1 at the root."""
    is_action_N: np.ndarray
    """bool: the policy chose that token. False at the root."""
    parent_N: np.ndarray
    """int64: -1 at the root."""
    length_N: np.ndarray
    """int64: tokens from the root."""
    depth_N: np.ndarray
    """int64: actions from the root."""
    end_N: np.ndarray
    """int64: one past the last node of the subtree."""
    nodes_K: tuple[np.ndarray, ...]
    """K arrays int64 [T + 1]: the nodes on each trajectory's path, the root first."""

    def __len__(self) -> int:
        return len(self.token_N)

    @property
    def ends_K(self) -> np.ndarray:
        """int64: the node that each trajectory ends at."""
        return np.array([nodes_T[-1] for nodes_T in self.nodes_K], np.int64)

    @property
    def is_end_N(self) -> np.ndarray:
        """bool: a trajectory ends there."""
        return np.isin(np.arange(len(self)), self.ends_K)

    def paths(self) -> list[tuple[int, ...]]:
        """The tokens from the root to each node."""
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, len(self)):
            paths.append((*paths[self.parent_N[node]], int(self.token_N[node])))
        return paths

    @classmethod
    def of(cls, trajectories_K: Sequence[Trajectory]) -> PrefixTree:
        """Sorted paths share their longest beginnings with their neighbours, so one pass numbers nodes in preorder."""
        keys_K = [tuple(zip(z.tokens_T.tolist(), z.is_action_T.tolist(), strict=True)) for z in trajectories_K]
        token, action, parent, length, depth, end = [-1], [False], [-1], [0], [0], [0]
        nodes_K: list[np.ndarray] = [np.zeros(0, np.int64)] * len(keys_K)
        path, previous = [0], ()
        for k in sorted(range(len(keys_K)), key=keys_K.__getitem__):
            key = keys_K[k]
            shared = next(
                (t for t, (a, b) in enumerate(zip(key, previous, strict=False)) if a != b), min(len(key), len(previous))
            )
            for closed in path[shared + 1 :]:
                end[closed] = len(token)
            del path[shared + 1 :]
            for token_t, action_t in key[shared:]:
                node = len(token)
                token.append(token_t)
                action.append(action_t)
                parent.append(path[-1])
                length.append(length[path[-1]] + 1)
                depth.append(depth[path[-1]] + action_t)
                end.append(0)
                path.append(node)
            nodes_K[k], previous = np.array(path), key
        for closed in path:
            end[closed] = len(token)
        ints = (np.array(values, np.int64) for values in (token, parent, length, depth, end))
        token_N, parent_N, length_N, depth_N, end_N = ints
        return cls(token_N, np.array(action), parent_N, length_N, depth_N, end_N, tuple(nodes_K))


def split(trajectories_K: Sequence[Trajectory], fits: Callable[[PrefixTree], bool]) -> list[tuple[PrefixTree, tuple[int, ...]]]:
    """The samples as one tree, or halved, neighbours together, until each tree `fits` or is a single path: trees, each with the
    indices of its trajectories."""

    def of(members: tuple[int, ...]) -> list[tuple[PrefixTree, tuple[int, ...]]]:
        tree = PrefixTree.of([trajectories_K[k] for k in members])
        if fits(tree) or len(tree) == 1 + tree.length_N.max():
            return [(tree, members)]
        half = len(members) // 2
        return of(members[:half]) + of(members[half:])

    return of(tuple(sorted(range(len(trajectories_K)), key=lambda k: trajectories_K[k].tokens_T.tolist())))


@dataclass(frozen=True, eq=False)
class Packed:
    """One tree laid out as a stretch of a row: the context, then the nodes, each followed by its branch, if it has one.

    A branch is a copy of a fixed suffix (the stop tokens, the evidence Y) that hangs off a node and is seen by nothing
    else: it scores `suffix` after every prefix in the same pass. Its last token is only predicted, never an input.
    """

    tree: PrefixTree
    input_ids_L: np.ndarray
    position_ids_L: np.ndarray
    """Tokens before it on its own path."""
    end_L: np.ndarray
    """One past the last position that sees it."""
    start_N: np.ndarray
    """Where each node lies; the root is the last token of the context."""
    branch_N: np.ndarray
    """bool: the node has a branch."""
    suffix: np.ndarray
    """int64 [S]."""

    def __len__(self) -> int:
        return len(self.input_ids_L)

    @classmethod
    def of(
        cls,
        tree: PrefixTree,
        context: Sequence[int],
        suffix: Sequence[int] = (),
        branch_N: np.ndarray | None = None,
    ) -> Packed:
        """`branch_N` says which nodes have the suffix; by default all, if there is one."""
        suffix_S = np.array(suffix, np.int64)
        if branch_N is None:
            branch_N = np.full(len(tree), len(suffix_S) > 0)
        inputs = max(len(suffix_S) - 1, 0)
        before = len(context) - 1
        offsets = before + np.concatenate([[0], np.cumsum(1 + inputs * branch_N)])
        start_N, total = offsets[:-1], int(offsets[-1])

        input_ids = np.empty(total, np.int64)
        position_ids = np.empty(total, np.int64)
        end = np.full(total, total)
        input_ids[: before + 1], position_ids[: before + 1] = context, np.arange(before + 1)
        input_ids[start_N[1:]] = tree.token_N[1:]
        position_ids[start_N] = before + tree.length_N
        end[start_N] = offsets[tree.end_N]  # where the node after the subtree lies
        if inputs:
            branch_at = start_N[branch_N, None] + 1 + np.arange(inputs)
            input_ids[branch_at] = suffix_S[:-1]
            position_ids[branch_at] = position_ids[start_N[branch_N], None] + 1 + np.arange(inputs)
            end[branch_at] = branch_at[:, -1:] + 1
        return cls(tree, input_ids, position_ids, end, start_N, branch_N, suffix_S)

    def edge_queries(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions, tokens) [N - 1]: what predicts each node but the root."""
        return self.start_N[self.tree.parent_N[1:]], self.tree.token_N[1:]

    def suffix_queries(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions, tokens), each [branches, S]: what predicts the suffix after each node that has it."""
        positions = self.start_N[self.branch_N, None] + np.arange(len(self.suffix))
        return positions, np.broadcast_to(self.suffix, positions.shape)


def rows_by_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of pieces packed into rows of at most `budget` tokens, longest first (first fit).

    A piece that is longer than the budget gets a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fit = next((r for r, left in enumerate(room) if left >= lengths[index]), None)
        if fit is None:
            rows.append([index])
            room.append(budget - lengths[index])
        else:
            rows[fit].append(index)
            room[fit] -= lengths[index]
    return rows
