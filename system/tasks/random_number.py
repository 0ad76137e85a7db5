"""An integer, uniform over an interval: a language model knows the numbers, but cannot draw one at random.

The posterior is known exactly, so that the distance to it can be measured and not only estimated (Hu et al. 2024, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.constraints import Constraints
from system.reward_config import FunctionReward
from system.task_config import NUMBER_REWARD, RandomNumber
from system.tasks.problem import Problem, context_tokens, ordinary_tokens, single_token, support
from system.text import decode
from system.trajectory import Prompt, sampled

REST = 1e-4
"""Most mass that everything but the numbers may have, as a share of theirs: nats by which the exact KL can be wrong."""


def build(section: RandomNumber, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """One prompt. Raises ConfigError if a digit or the stop is no token, or under `log_reward` other strings have real mass.

    The outcomes are the numbers, in every way that the tokens have to write one, and the target is uniform over them. They are
    listed under the rewards of this file alone: by another one the numbers are not equally good.
    """
    digits = {digit: single_token(tokenizer, digit, "digit") for digit in "0123456789"}
    stop = single_token(tokenizer, section.stop, "task.stop")
    context = context_tokens(tokenizer, section.prompt.format(low=section.low, high=section.high))
    meta = {"low": section.low, "high": section.high, "floor": section.floor}
    allowed = list(digits.values()) if section.support == "digits" else ordinary_tokens(tokenizer)
    constraints = support(section, tokenizer, stop, allowed)
    pieces: dict[str, list[int]] = {}
    for token in allowed:
        if (text := decode(tokenizer, [token])).isdecimal() and text.isascii():
            pieces.setdefault(text, []).append(token)
    outcomes = tuple(
        sampled(tokens, max_tokens=constraints.max_tokens)
        for number in range(section.low, section.high + 1)
        for tokens in _written(str(number), pieces, constraints.max_tokens)
        if decode(tokenizer, tokens) == str(number)  # some tokens read otherwise beside others
    )
    if isinstance(section.reward, FunctionReward) and section.reward.path == NUMBER_REWARD:
        _check_floor(section, section.reward.beta, constraints, len(outcomes))
    return Problem(
        prompts=(Prompt("random_number", context, context, meta=meta),),
        constraints=constraints,
        reward_stop=(stop,),
        outcomes=outcomes if section.is_listed else None,
        log_target_O=np.full(len(outcomes), -np.log(len(outcomes))) if section.is_listed else None,
    )


def _written(number: str, pieces: Mapping[str, Sequence[int]], most: int) -> Iterator[list[int]]:
    """The sequences of at most `most` tokens that read as `number`: 42 is one token in some vocabularies, and two."""
    if not number:
        yield []
    for end in range(1, len(number) + 1) if most else ():
        for token in pieces.get(number[:end], ()):
            yield from ([token, *rest] for rest in _written(number[end:], pieces, most - 1))


def _check_floor(section: RandomNumber, beta: float, constraints: Constraints, numbers: int) -> None:
    """Raises ConfigError if uniform over the numbers is not the posterior."""
    tokens = len(constraints.columns) - 1  # besides the stop
    strings = sum(tokens**length for length in range(constraints.min_tokens, constraints.max_tokens + 1))
    others = strings - numbers
    highest = beta * (math.log(REST * numbers) - math.log(others))
    if section.floor > highest:
        share = math.exp(min(700.0, section.floor / beta + math.log(others) - math.log(numbers)))
        raise ConfigError(
            f"task.floor={section.floor:g}: {others:.3g} strings that are no number can be drawn (task.support="
            f"{section.support}, at most {constraints.max_tokens} tokens by task.longest), with {share:.2g} times the mass of "
            f"the {numbers} numbers in all, so that uniform is not the posterior; lower task.floor to {math.floor(highest)}"
        )


def log_reward(prompt: Prompt, text: str, tokens: list[int]) -> float:
    """0 for a number of the interval, written as it is (no leading zero); the floor for anything else. Nats."""
    return 0.0 if is_number(prompt, text) else float(prompt.meta["floor"])


def paper_log_reward(prompt: Prompt, text: str, tokens: list[int]) -> float:
    """8 for a number of the interval, -8 for each token of anything else, as in the paper's code. Nats.

    Over a whole vocabulary V this posterior is not the numbers alone: the V^n strings of n tokens share V^n exp(-8 n), which
    grows with n (ln 49152 = 10.8 > 8) and passes the numbers' 101 exp(8) at n = 5. What the policy never draws it never
    unlearns, so on-policy training ends near the numbers all the same.
    """
    return 8.0 if is_number(prompt, text) else -8.0 * max(1, len(tokens))


def is_number(prompt: Prompt, text: str) -> bool:
    """A number of the interval, written as it is: no leading zero, no space."""
    number = int(text) if text.isdecimal() and text.isascii() else -1
    return str(number) == text and prompt.meta["low"] <= number <= prompt.meta["high"]
