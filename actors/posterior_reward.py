"""log R by the frozen model: its posterior, and what evidence says among its alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from system.language_model import LanguageModel
from system.prefix_tree import Packed, PrefixTree, rows_by_budget, split
from system.scores import Scores
from system.trajectory import Prompt, Trajectory


class _Part(NamedTuple):
    """What is scored in one row."""

    tree: PrefixTree
    members: tuple[int, ...]
    """The trajectories that the tree is of."""
    branch_N: np.ndarray
    """bool: the stop and the evidence are scored after this node."""


class Posterior:
    """log p(Z stop | X), plus log p(Y | X Z stop) where the prompt has evidence Y, under the frozen model.

    One packed pass: each distinct prefix once, and a branch with the stop and Y after each of them, in place of T + 1
    passes. A group that does not fit the token budget is several rows, which go on from one reading of X where the model
    can; so is a sample whose branches alone do not fit. `tokens_forwarded` counts what that costs.
    """

    def __init__(
        self, model: LanguageModel, stop: Sequence[int], token_budget: int | None = None, every_prefix: bool = True
    ) -> None:
        """`token_budget` is by default 16,384 with block attention and 1,024 with dense masks. Without `every_prefix`, log R is
        known where a trajectory of the group ends, and NaN elsewhere."""
        self.model = model
        self.every_prefix = every_prefix
        self.stop = tuple(stop)
        # With dense masks the cost of attention, and of the mask, grows with the row's square.
        self.token_budget = token_budget or (16_384 if model.attention == "block" else 1024)
        self.tokens_forwarded = 0

    @property
    def progress(self) -> int:
        return self.tokens_forwarded

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        return Scores(self.log_rewards(prompt, trajectories_K))

    def log_rewards(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> list[np.ndarray]:
        """K arrays float64 [T + 1], nats; every sample has one."""
        suffix = self.stop + tuple(prompt.evidence_tokens or ())
        read, context = prompt.reward_tokens, None
        parts = self._parts(len(read), trajectories_K, suffix)
        if len(parts) > 1 and len(read) > 1 and (context := self.model.read(read[:-1])) is not None:
            self.tokens_forwarded += context.length
            read = read[-1:]
            parts = self._parts(len(read), trajectories_K, suffix)
        pieces = [Packed.of(part.tree, read, suffix, part.branch_N) for part in parts]
        result = [np.full(len(trajectory) + 1, np.nan) for trajectory in trajectories_K]
        for row in rows_by_budget([len(piece) for piece in pieces], self.token_budget):
            self.tokens_forwarded += sum(len(pieces[index]) for index in row)
            for index, (edge_N, suffix_N) in zip(row, self.model.score([pieces[index] for index in row], context), strict=True):
                tree, members = parts[index].tree, parts[index].members
                for k, nodes_T in zip(members, tree.nodes_K, strict=True):
                    # Of a sample in several parts each knows what the others do not.
                    result[k] = np.fmax(result[k], np.cumsum(edge_N[nodes_T]) + (suffix_N[nodes_T] if suffix else 0.0))
        return result

    def _parts(self, before: int, trajectories_K: Sequence[Trajectory], suffix: tuple[int, ...]) -> list[_Part]:
        """The group in rows of at most the token budget, with the `before` tokens that each begins with. A row holds at least
        as many other tokens as it begins with: a long prompt would be read for nearly every sample, a long sample for nearly
        every branch."""
        inputs = max(0, len(suffix) - 1)

        def branches(tree: PrefixTree) -> np.ndarray:
            return np.arange(len(tree)) if self.every_prefix else np.unique(tree.ends_K)

        parts, longest = [], max(self.token_budget, 2 * before)
        for tree, members in split(trajectories_K, lambda tree: before + len(tree) + len(branches(tree)) * inputs <= longest):
            alone, at = before + len(tree), branches(tree)
            whole = alone + len(at) * inputs <= longest
            # Branches without inputs cost nothing, however many there are.
            fit = max(1, len(at) if whole or not inputs else max(longest - alone, alone) // inputs)
            for first in range(0, len(at), fit):
                branch_N = np.zeros(len(tree), bool)
                branch_N[at[first : first + fit]] = bool(suffix)
                parts.append(_Part(tree, members, branch_N))
        return parts


class Contrast:
    """power * log of how much of p(Y' | X Z stop), over all evidences Y' that a prompt may have, is the prompt's own Y's."""

    def __init__(self, posterior: Posterior, evidences: Mapping[str, Sequence[tuple[int, ...]]], power: float = 1.0) -> None:
        """`evidences` has, by a prompt's id, its own and those of the other labels."""
        self.posterior, self.evidences, self.power = posterior, evidences, power

    @property
    def tokens_forwarded(self) -> int:
        return self.posterior.tokens_forwarded

    @property
    def progress(self) -> int:
        return self.posterior.progress

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        others = [evidence for evidence in self.evidences[prompt.id] if evidence != prompt.evidence_tokens]
        prompts = [prompt, *(replace(prompt, evidence_tokens=evidence) for evidence in others)]
        # p(Z stop | X) is in each of them and cancels.
        log_joint_EK = [self.posterior.log_rewards(one, trajectories_K) for one in prompts]
        return Scores(
            [
                self.power * (own_T - np.logaddexp.reduce((own_T, *others_ET)))
                for own_T, *others_ET in zip(*log_joint_EK, strict=True)
            ]
        )
