"""A posterior small enough to list: strings over {a, b} up to length 3, for two prompts of different Z.

The policy is a table of logits, one row a state, so that training it tests the losses and nothing else.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from learner.losses import States
from learner.states import NodeLogQ, node_log_reward, states_of
from system.prefix_tree import PrefixTree
from system.trajectory import Group, Prompt, Trajectory

LETTERS, MAX_TOKENS = 2, 3
STOP = LETTERS
STRINGS = [s for n in range(MAX_TOKENS + 1) for s in itertools.product(range(LETTERS), repeat=n)]
INDEX = {s: i for i, s in enumerate(STRINGS)}
NEXT = np.array([[INDEX.get((*s, letter), -1) for letter in range(LETTERS)] for s in STRINGS])
"""[states, letters]: the state that a letter leads to."""
PROMPTS = [Prompt("first", (0,), (0,)), Prompt("second", (1,), (1,))]


class Toy:
    """`min_tokens` = 1 makes the root a state that cannot stop."""

    def __init__(self, min_tokens: int = 0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.min_tokens = min_tokens
        # The second prompt's Z is e^5 times the first's: a loss that mixes prompts cannot fit both.
        self.log_reward = [rng.normal(0.0, 1.5, len(STRINGS)), rng.normal(5.0, 1.5, len(STRINGS))]
        self.logits = torch.zeros(2, len(STRINGS), LETTERS + 1, dtype=torch.float64, requires_grad=True)
        length = torch.tensor([len(string) for string in STRINGS])
        self._closed = torch.zeros(len(STRINGS), LETTERS + 1, dtype=torch.bool)
        self._closed[length == MAX_TOKENS, :STOP] = True
        self._closed[length < min_tokens, STOP] = True

    def terminable(self, string: tuple[int, ...]) -> bool:
        return len(string) >= self.min_tokens

    def log_probs(self, prompt: int) -> Tensor:
        """[states, letters + stop]: the masked policy."""
        return self.logits[prompt].masked_fill(self._closed, -torch.inf).log_softmax(-1)

    def log_q(self, prompt: int) -> Tensor:
        """[terminable strings]: log-probability of each outcome."""
        table = self.log_probs(prompt)
        values = []
        for string in filter(self.terminable, STRINGS):
            steps = [table[INDEX[string[:t]], letter] for t, letter in enumerate(string)]
            values.append(torch.stack([*steps, table[INDEX[string], STOP]]).sum())
        return torch.stack(values)

    def target(self, prompt: int, temperature: float = 1.0) -> np.ndarray:
        log_reward = np.array([self.log_reward[prompt][INDEX[s]] for s in STRINGS if self.terminable(s)]) / temperature
        weights = np.exp(log_reward - log_reward.max())
        return weights / weights.sum()

    def log_z(self, prompt: int, temperature: float = 1.0) -> float:
        log_reward = np.array([self.log_reward[prompt][INDEX[s]] for s in STRINGS if self.terminable(s)]) / temperature
        return float(np.logaddexp.reduce(log_reward))

    def total_variation(self, prompt: int) -> float:
        return 0.5 * float(np.abs(self.log_q(prompt).detach().exp().numpy() - self.target(prompt)).sum())

    def sample(self, prompt: int, k: int, rng: np.random.Generator, uniform: bool) -> list[tuple[int, ...]]:
        """k strings, from the policy or from uniform choices at every state."""
        table = self.log_probs(prompt).detach()
        allowed = torch.isfinite(table).double()
        probs = (allowed / allowed.sum(-1, keepdim=True) if uniform else table.exp()).numpy()
        cumulated = probs.cumsum(1) / probs.sum(1, keepdims=True)
        row_K, live_K = np.zeros(k, np.int64), np.ones(k, bool)
        while live_K.any():
            letter_K = (rng.random((k, 1)) >= cumulated[row_K]).sum(1)
            live_K &= letter_K != STOP
            row_K[live_K] = NEXT[row_K[live_K], letter_K[live_K]]
        return [STRINGS[row] for row in row_K]

    def group(self, prompt: int, strings: list[tuple[int, ...]]) -> Group:
        """Rewards at every prefix that can stop; NaN elsewhere."""
        trajectories, rewards = [], []
        for string in strings:
            tokens = np.array(string, np.int32)
            trajectories.append(
                Trajectory(tokens, np.ones(len(string), bool), np.zeros(len(string) + 1, np.float32), "sampled")
            )
            prefixes = [string[:t] for t in range(len(string) + 1)]
            rewards.append(np.array([self.log_reward[prompt][INDEX[s]] if self.terminable(s) else np.nan for s in prefixes]))
        return Group(PROMPTS[prompt], tuple(trajectories), tuple(rewards), 0, 0)

    def states(self, prompt: int, group: Group, temperature: float = 1.0) -> States:
        tree = PrefixTree.of(group.trajectories_K)
        table = self.log_probs(prompt)
        row_N = np.zeros(len(tree), np.int64)
        for node in range(1, len(tree)):
            row_N[node] = NEXT[row_N[tree.parent_N[node]], tree.token_N[node]]
        edges = table[row_N[tree.parent_N[1:]], tree.token_N[1:].astype(np.int64)]
        edge_N = torch.cat([table.new_zeros(1), edges])
        stop_N = table[row_N, STOP].masked_fill(self._closed[row_N, STOP], 0.0)
        return states_of(tree, node_log_reward(tree, group), NodeLogQ(edge_N, stop_N), temperature)

    def set_to_posterior(self) -> None:
        """The logits of the exact posterior: flow of each child, and the reward as the flow into the stop."""
        with torch.no_grad():
            for prompt in range(2):
                flow: dict[tuple[int, ...], float] = {}
                for string in sorted(STRINGS, key=len, reverse=True):
                    own = self.log_reward[prompt][INDEX[string]] if self.terminable(string) else -np.inf
                    below = [flow[(*string, letter)] for letter in range(LETTERS)] if len(string) < MAX_TOKENS else []
                    flow[string] = float(np.logaddexp.reduce([own, *below]))
                    row = self.logits[prompt, INDEX[string]]
                    row[STOP] = own if np.isfinite(own) else 0.0
                    row[:STOP] = torch.tensor(below or [0.0] * LETTERS, dtype=row.dtype)
