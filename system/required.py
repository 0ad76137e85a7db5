"""Words that a sample must have: the part of the policy's support that depends on what was drawn, not on its length alone.

The stop is in the support only once all words are there, and where the places that are left are just enough for those that
are missing, they come next for certain. So q covers the texts that have every word, with two exceptions. At the last places
what is missing comes in one fixed form and order, so that others cannot be drawn there. And later tokens can make another word
of one: if no place is left to write it again, the sample goes on to its greatest length without it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from system.text import decode


def has_word(text: str, word: str) -> bool:
    """Whole, whatever its case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


@dataclass(frozen=True, eq=False)
class Required:
    tokenizer: PreTrainedTokenizerBase
    words: tuple[str, ...]
    written: tuple[tuple[int, ...], ...]
    """Tokens of each word, as it is written where it must come next."""
    max_tokens: int
    """Of a sample, its stop not among them. Raises ValueError where the words have more."""

    def __post_init__(self) -> None:
        if (needed := sum(map(len, self.written))) > self.max_tokens:
            raise ValueError(f"{list(self.words)} are {needed} tokens, more than max_tokens={self.max_tokens}")

    def after(self, tokens: Sequence[int]) -> tuple[bool, int | None]:
        """(the stop is in the support, the token that comes next for certain or None) after these tokens of a sample."""
        first = max(0, self.max_tokens - sum(map(len, self.written)))
        for at in range(first, len(tokens)):
            missing = self._missing(tokens[:at])
            if missing and len(missing) == self.max_tokens - at:
                # From there on they are being written.
                coming = missing[len(tokens) - at :]
                return not coming, coming[0] if coming else None
        missing = self._missing(tokens)
        return not missing, missing[0] if missing and len(missing) == self.max_tokens - len(tokens) else None

    def _missing(self, tokens: Sequence[int]) -> list[int]:
        """The tokens of the words that are not there yet."""
        text = decode(self.tokenizer, tokens)
        absent = [tokens_W for word, tokens_W in zip(self.words, self.written, strict=True) if not has_word(text, word)]
        return [token for tokens_W in absent for token in tokens_W]
