"""Tools that write into a sample while it is drawn. What they write is context, never an action: log q leaves it out."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from system.text import decode


class Tool(Protocol):
    def output(self, tokens: Sequence[int]) -> Sequence[int]:
        """What is written after `tokens`, the sample so far with earlier outputs in it; nothing for most. Deterministic."""
        ...


@dataclass(frozen=True, eq=False)
class Calculator:
    """After `=`, the result of the two-operand expression before it, back to the last comma. It never runs the text.

    ` 9 - 3 =` is answered by ` 6`. Anything but two integers of at most six digits with + or - between them is left alone.
    """

    tokenizer: PreTrainedTokenizerBase

    def output(self, tokens: Sequence[int]) -> Sequence[int]:
        # At every token of every sample: the text is put together only where the last one may end an expression.
        if not decode(self.tokenizer, tokens[-1:]).endswith("="):
            return ()
        text = decode(self.tokenizer, tokens)
        match = EXPRESSION.fullmatch(text[:-1].rpartition(",")[2].rpartition("=")[2])
        if match is None:
            return ()
        left, sign, right = match.groups()
        return self.tokenizer.encode(f" {OPERATORS[sign](int(left), int(right))}", add_special_tokens=False)


EXPRESSION = re.compile(r"\s*(-?\d{1,6})\s*([+-])\s*(-?\d{1,6})\s*", re.ASCII)
OPERATORS = {"+": operator.add, "-": operator.sub}


class Player:
    """A sample as it grows, token by token: which are actions, and what the tool makes come next."""

    def __init__(self, tool: Tool | None, budget: int) -> None:
        """`budget` is the most tokens that the tool may write into one sample; an output that exceeds it is left out."""
        self._tool, self._budget = tool, budget
        self._tokens: list[int] = []
        self._pending: list[int] = []
        self.is_action: list[bool] = []
        self.depth = 0
        """Actions so far."""

    @property
    def forced(self) -> int | None:
        """The token that must come next, because the tool writes it; None where the policy chooses."""
        return self._pending[0] if self._pending else None

    def push(self, token: int) -> None:
        """Raises ValueError for another token than the forced one."""
        self._tokens.append(token)
        if self._pending:
            if token != self._pending.pop(0):
                raise ValueError(f"token {token} stands where the tool writes another one: {self._tokens}")
            self.is_action.append(False)
            return
        self.is_action.append(True)
        self.depth += 1
        output = list(self._tool.output(self._tokens)) if self._tool else []
        if len(output) <= self._budget:
            self._budget -= len(output)
            self._pending = output


def play(tool: Tool | None, budget: int, actions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [T], is_action bool [T]) of a sample with these actions, the tool's outputs put in."""
    player, tokens = Player(tool, budget), []

    def write(token: int) -> None:
        player.push(token)
        tokens.append(token)

    for action in actions:
        write(action)
        while player.forced is not None:
            write(player.forced)
    return np.array(tokens, np.int32), np.array(player.is_action, bool)
