"""What everything that runs a config begins with: the model's folder, its tokenizer, and the task's problem."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from system.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from system.tasks.problem import Problem


@dataclass(frozen=True)
class Prepared:
    folder: Path
    """Of the base model, in Hugging Face format."""
    tokenizer: PreTrainedTokenizerBase
    problem: Problem


def prepare(config: Config) -> Prepared:
    """Raises ConfigError if the model or the task's data cannot be had, its prompts do not fit the model, or what is to be
    planted does not fit a sample."""
    from system import tasks
    from system.models import context_length, locate
    from system.pretrained import load_tokenizer

    folder = locate(config.model)
    tokenizer = load_tokenizer(folder)
    problem = tasks.build(config.task, tokenizer)
    config.check_lengths(context_length(folder), problem.lengths)
    config.check_planted(problem.prompts[0].hints)
    return Prepared(folder, tokenizer, problem)
