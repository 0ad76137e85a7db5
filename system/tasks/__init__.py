"""One file for each inference problem: its prompts, its support, its reward where that is its own, its exact answer.

A new task is a config section (system/task_config.py), a file here with a `build(section, tokenizer) -> Problem`, and an
entry in BUILDERS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from system.tasks import arithmetic, constrained, continuation, infilling, random_number, subjectivity, verifiable
from system.tasks.problem import Problem

BUILDERS: dict[str, Callable[[Any, PreTrainedTokenizerBase], Problem]] = {
    "random_number": random_number.build,
    "continuation": continuation.build,
    "infilling": infilling.build,
    "constrained": constrained.build,
    "verifiable": verifiable.build,
    "arithmetic": arithmetic.build,
    "subjectivity": subjectivity.build,
}


def build(section: Any, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """The problem of a config section `task`. Raises ConfigError where its values do not fit the tokenizer or the data."""
    return BUILDERS[section.kind](section, tokenizer).holding_out(getattr(section, "held_out", 0))
