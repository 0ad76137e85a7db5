"""What an experiment with `task.predicate` asks for."""

from __future__ import annotations

from collections.abc import Sequence

from system.trajectory import Prompt


def eight_words(prompt: Prompt, text: str, tokens: Sequence[int]) -> bool:
    return len(text.split()) == 8
