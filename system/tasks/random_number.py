"""An integer, uniform over an interval: a language model knows the numbers, but cannot draw one at random.

The posterior is known exactly, so that the distance to it can be measured and not only estimated (Hu et al. 2024, section 2).
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from system.config import RandomNumber
from system.tasks.problem import Problem, context_tokens, sampled, single_token, support
from system.trajectory import Prompt


def build(section: RandomNumber, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """One prompt; the support is the ten digits and the stop. Raises ConfigError if a digit or the stop is no token.

    Under a reward that is not the task's own, the target is not uniform, so no outcomes are listed.
    """
    digits = {digit: single_token(tokenizer, digit, "digit") for digit in "0123456789"}
    stop = single_token(tokenizer, section.stop, "task.stop")
    context = context_tokens(tokenizer, section.prompt.format(low=section.low, high=section.high))
    meta = {"low": section.low, "high": section.high, "floor": section.floor}
    outcomes = tuple(sampled([digits[digit] for digit in str(number)]) for number in range(section.low, section.high + 1))
    uniform = section.reward == RandomNumber().reward
    return Problem(
        prompts=(Prompt("random_number", context, context, meta=meta),),
        constraints=support(section, tokenizer, stop, list(digits.values())),
        reward_stop=(stop,),
        outcomes=outcomes if uniform else None,
        log_target_O=np.full(len(outcomes), -np.log(len(outcomes))) if uniform else None,
    )


def log_reward(prompt: Prompt, text: str, tokens: list[int]) -> float:
    """0 for a number of the interval, written as it is (no leading zero); the floor for anything else. Nats."""
    number = int(text) if text.isdecimal() and text.isascii() else -1
    valid = str(number) == text and prompt.meta["low"] <= number <= prompt.meta["high"]
    return 0.0 if valid else float(prompt.meta["floor"])
