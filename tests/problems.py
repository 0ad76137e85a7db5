"""Problems of any kind of task, with a tokenizer of one character a token unless another is given, and what judges say."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from system import tasks
from system.config_file import parse
from system.tasks.problem import Problem
from system.text import decode
from system.trajectory import Prompt
from tests import tiny

TOKENIZER = tiny.tokenizer(64)


def problem(kind: str, tokenizer: PreTrainedTokenizerBase = TOKENIZER, **fields: Any) -> Problem:
    return tasks.build(parse({"task": {"kind": kind, **fields}}).task, tokenizer)


def text_of(prompt: Prompt) -> str:
    """What the policy sees, without the beginning-of-sequence token."""
    return decode(TOKENIZER, prompt.policy_tokens[1:])


def asked(**meta: Any) -> Prompt:
    return Prompt("p", (1,), (1,), meta=meta)


def judged(judge: Any, prompt: Prompt, texts: list[str], unscored: int = 0) -> dict[str, float]:
    """By a judge that reads texts alone."""
    return judge(prompt, texts, [[]] * len(texts), unscored)
