"""Questions with answers that a program can check: R = p(Z stop | X) * exp(r(Z) / beta), known at the end alone.

The setting of reinforcement learning with verifiable rewards; its KL-regularised optimum is this posterior (TBA,
arXiv:2503.18929). Without a file the questions are all sums of two digits.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.reward_config import FunctionReward, factors
from system.task_config import LAST_NUMBER, Verifiable
from system.tasks.files import choose, distinct, joined, read_records
from system.tasks.problem import (
    Problem,
    chat_context,
    completions,
    context_tokens,
    demonstrated,
    ordinary_tokens,
    single_token,
    support,
)
from system.trajectory import Prompt
from system.voting import wins


def build(section: Verifiable, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Raises ConfigError if the questions cannot be read, the verifier takes no such answer, or the stop is not one token."""
    stop = single_token(tokenizer, section.stop, "task.stop")
    constraints = support(section, tokenizer, stop, ordinary_tokens(tokenizer))
    prompts, known = [], {}
    for number, record in read_questions(section):
        text = section.prompt.format(question=record["question"])
        if section.chat:
            _, context = chat_context(tokenizer, [{"role": "user", "content": text}], "task.chat=true")
        else:
            context = context_tokens(tokenizer, text)
        prompts.append(Prompt(f"question-{number}", context, context, meta=record))
        where = f"task.questions={section.questions!r}, line {number}"
        known[f"question-{number}"] = completions(record, tokenizer, section.stop, where)
    if any(isinstance(factor, FunctionReward) and factor.path == LAST_NUMBER for _, factor in factors(section.reward)):
        for prompt in prompts:
            try:
                _answer(prompt)
            except ValueError as error:
                raise ConfigError(f"task.questions={section.questions!r}: {error}") from error
    return Problem(
        prompts=tuple(prompts),
        constraints=constraints,
        reward_stop=(stop,),
        judge=correctness,
        **demonstrated(known, constraints, tokenizer),
    )


def read_questions(section: Verifiable) -> list[tuple[int, dict[str, Any]]]:
    """(number from 1, record with question and answer as texts) of those chosen by offset and limit.

    Raises:
        ConfigError: the file is missing, or a line of it is no question; the message has the line's number.
    """
    if section.questions == "packaged":
        pairs = itertools.product(range(10), repeat=2)
        everything = [(n, {"question": f"What is {a} + {b}?", "answer": str(a + b)}) for n, (a, b) in enumerate(pairs, 1)]
    else:
        records = read_records(Path(section.questions), "task.questions")
        asked = [(number, _question(record, number, section)) for number, record in records]
        everything = distinct(joined(asked, _said), "task.questions", section.questions, key=_said)
    return choose(everything, section.offset, section.limit, "task.questions", section.questions)


def _said(record: dict[str, Any]) -> tuple[str, str]:
    """What makes two questions the same."""
    return record["question"], record["answer"]


def _question(record: Any, number: int, section: Verifiable) -> dict[str, Any]:
    match record:
        case {"question": str(question), "answer": str() | int() | float() as answer} if question.strip():
            return record | {"question": question.strip(), "answer": str(answer)}
    where = f"task.questions={section.questions!r}, line {number}"
    raise ConfigError(f'{where}: needs {{"question": text, "answer": text or number}}')


def correctness(prompt: Prompt, texts: Sequence[str], tokens_K: Sequence[Sequence[int]], unscored: int) -> dict[str, float]:
    """Accuracy of the samples, whether their majority is right (a tie is not, nor are most without a number or a verdict),
    and the share of distinct texts among the right ones, NaN without any. Nothing for an answer that is no number."""
    try:
        answer = _answer(prompt)
    except ValueError:
        return {}
    given_K = [_number(text) for text in texts]
    right = [text for text, given in zip(texts, given_K, strict=True) if given == answer]
    return {
        "accuracy": len(right) / (len(texts) + unscored),
        "vote": float(wins([*given_K, *[None] * unscored], answer)),
        "distinct_answers": len(set(right)) / len(right) if right else math.nan,
    }


# A minus belongs to the number where nothing is subtracted from; 1,000 is one number.
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def _number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def last_number(prompt: Prompt, text: str, tokens: list[int]) -> float:
    """1 if the last number of the text is the answer, else 0; a text without one is wrong."""
    return float(_number(text) == _answer(prompt))


def _answer(prompt: Prompt) -> float:
    try:
        return float(prompt.meta["answer"].replace(",", ""))
    except ValueError:
        raise ValueError(
            f"prompt {prompt.id!r}: the answer {prompt.meta['answer']!r} is no number; "
            "name a verifier of your own in task.reward"
        ) from None
