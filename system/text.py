"""Tokens as text: what rewards, tools and constraints read, so that all of them read the same."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of one sequence, as it is: nothing cleaned up or left out."""
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
