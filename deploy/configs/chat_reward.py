"""What `chat.yaml` asks of an answer; `deploy/baselines.py CONFIG --methods ancestral --samples 4` shows what it gives."""

from __future__ import annotations

from collections.abc import Sequence

from system.trajectory import Prompt


def score(prompt: Prompt, text: str, tokens: Sequence[int]) -> float:
    """Half for a single sentence, half for the words of the line's "wanted". `text` is without the stop; all that the line of
    the file has is in `prompt.meta`."""
    wanted = prompt.meta["wanted"]
    found = sum(word in text.lower() for word in wanted) / len(wanted)
    is_sentence = text.strip().endswith((".", "!")) and text.strip().count(".") <= 1
    return 0.5 * is_sentence + 0.5 * found
