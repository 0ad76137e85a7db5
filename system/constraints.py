"""The one definition of the policy's support: what the engine may draw and what the learner's log q is normalised over.

At a state of depth d (actions taken so far) the support is
  * the allowed tokens and, once d >= min_tokens, the stop token;
  * at d = max_tokens the stop alone: log q(stop) = 0.
Where words are required (`system.required`) the stop waits for them too, and at the last places they are the support.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from system.prefix_tree import PrefixTree
from system.required import Required


@dataclass(frozen=True, eq=False)
class Constraints:
    """Support of q(. | state). Build it with `Constraints.of`, which checks the values."""

    stop_token: int
    min_tokens: int
    max_tokens: int
    columns: np.ndarray
    """int64 [C], sorted: the allowed tokens and the stop token. Log q is a log-softmax over these columns alone."""
    vocab_size: int
    tool_tokens: int = 0
    """Most tokens that a tool may write into a sample, besides the actions."""
    required: Required | None = None
    """Not together with a tool."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, the tool's among them, the stop not."""
        return self.max_tokens + self.tool_tokens

    @classmethod
    def of(
        cls,
        *,
        stop_token: int,
        min_tokens: int,
        max_tokens: int,
        vocab_size: int,
        allowed: Sequence[int] | np.ndarray | None = None,
        tool_tokens: int = 0,
    ) -> Constraints:
        """`allowed` are the tokens that may be drawn before the stop; None means all of the vocabulary.

        Raises:
            ValueError: a token outside the vocabulary, nothing allowed but the stop, or lengths that contradict.
        """
        columns = np.arange(vocab_size) if allowed is None else np.union1d(np.asarray(allowed, np.int64), [stop_token])
        if not 0 <= stop_token < vocab_size or columns[0] < 0 or columns[-1] >= vocab_size:
            raise ValueError(f"stop token {stop_token} and allowed tokens must be in a vocabulary of {vocab_size}")
        if len(columns) < 2:
            raise ValueError("nothing is allowed but the stop token: the only sample would be the empty one")
        if not 0 <= min_tokens <= max_tokens or max_tokens < 1:
            raise ValueError(f"min_tokens={min_tokens}, max_tokens={max_tokens}: 0 <= min <= max and max >= 1 are needed")
        return cls(stop_token, min_tokens, max_tokens, columns.astype(np.int64), vocab_size, tool_tokens)

    @property
    def stop_column(self) -> int:
        """Where the stop token stands in `columns`."""
        return int(np.searchsorted(self.columns, self.stop_token))

    def column_of(self, tokens: np.ndarray) -> np.ndarray:
        """Positions of token ids in `columns`. Raises ValueError for a token outside the support."""
        position = np.searchsorted(self.columns, tokens)
        found = self.columns[np.minimum(position, len(self.columns) - 1)] == tokens
        if not np.all(found):
            raise ValueError(f"tokens {np.unique(np.asarray(tokens)[~found])[:8].tolist()} are outside the policy's support")
        return position

    def admits(self, tokens: Sequence[int] | np.ndarray) -> bool:
        """The policy could draw these actions and then stop."""
        if not (self.allows(tokens) and self.min_tokens <= len(tokens) <= self.max_tokens):
            return False
        if self.required is None:
            return True
        drawn = [int(token) for token in tokens]
        certain_T = [self.after(drawn[:t])[1] for t in range(len(drawn))]
        return self.after(drawn)[0] and all(certain in (None, token) for certain, token in zip(certain_T, drawn, strict=True))

    def described(self) -> dict[str, Any]:
        """What `is_within` asks of a support, JSON-serialisable."""
        return {"tokens": self._tokens, "min_tokens": self.min_tokens, "max_tokens": self.max_tokens}

    @cached_property
    def _tokens(self) -> str:
        """A digest of the tokens and the stop, which every story that a model told is asked for."""
        return hashlib.sha256(np.append(self.columns, self.stop_token).astype(np.int64).tobytes()).hexdigest()[:16]

    def is_within(self, described: Mapping[str, Any]) -> bool:
        """The support that described itself so has the same tokens and stop, and at least these lengths."""
        lengths = described["min_tokens"] <= self.min_tokens <= self.max_tokens <= described["max_tokens"]
        return lengths and described["tokens"] == self._tokens

    def allows(self, tokens: Sequence[int] | np.ndarray) -> bool:
        """Each of these tokens may be drawn before the stop."""
        return bool(np.isin(tokens, self.columns).all()) and self.stop_token not in tokens

    def after(self, tokens: Sequence[int], actions: int | None = None) -> tuple[bool, int | None]:
        """(the stop is in the support, the token that comes next for certain or None) after these tokens, of which so many are
        actions; by default all."""
        depth = len(tokens) if actions is None else actions
        if depth >= self.max_tokens:
            return True, self.stop_token
        may_stop, certain = self.required.after(tokens) if self.required else (True, None)
        return may_stop and depth >= self.min_tokens, certain

    def can_stop(self, tokens: Sequence[int], actions: int) -> bool:
        """The stop is in the support after these tokens, of which so many are actions."""
        return self.after(tokens, actions)[0]

    def of_tree(self, tree: PrefixTree) -> tuple[np.ndarray, np.ndarray]:
        """bool [N]: the stop is in the support at a node; and the policy chose the token that leads to it, which was neither
        a tool's nor certain."""
        may_stop_N, certain_N = self.may_stop(tree.depth_N), np.zeros(len(tree), bool)
        if self.required:
            for node, tokens in enumerate(tree.paths()):
                may_stop_N[node], certain = self.after(tokens)
                certain_N[node] = certain is not None
        return may_stop_N, tree.is_action_N & ~certain_N[tree.parent_N]

    def may_stop(self, depth: np.ndarray) -> np.ndarray:
        """bool: this many actions are enough for the stop."""
        return np.asarray(depth) >= self.min_tokens

    def must_stop(self, depth: np.ndarray) -> np.ndarray:
        """bool: nothing but the stop is in the support at this many actions."""
        return np.asarray(depth) >= self.max_tokens
