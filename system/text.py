"""Tokens as text: what rewards, tools and constraints read, so that all of them read the same."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Those with a role of their own, such as the end of a sequence, and all others that the tokenizer marks as special."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return marked | set(tokenizer.all_special_ids)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of one sequence, as it is: nothing cleaned up or left out."""
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
