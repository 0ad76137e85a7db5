"""Random numbers: what is rewarded, which outcomes are listed, and the floors under which uniform is not the posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.tasks.random_number import log_reward, paper_log_reward
from system.text import decode
from system.trajectory import Prompt
from tests import tiny
from tests.problems import TOKENIZER, problem, text_of


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("0", True), ("7", True), ("42", True), ("99", True), ("100", True),
        ("101", False), ("999", False), ("", False), ("00", False), ("007", False), ("042", False), ("0100", False),
        ("-1", False), ("+1", False), ("1.0", False), (" 1", False), ("1 ", False), ("1\n", False), ("1_0", False),
        ("x", False), ("1x", False), ("١٢", False), ("\uff14\uff12", False), ("²", False), ("½", False), ("9" * 30, False),
    ],
)  # fmt: skip
def test_a_number_of_the_interval_as_it_is_written_has_log_reward_0(text: str, valid: bool) -> None:
    prompt = Prompt("x", (1,), (1,), meta={"low": 0, "high": 100, "floor": -12.0})
    assert log_reward(prompt, text, []) == (0.0 if valid else -12.0)


def test_the_ends_of_the_interval_belong_to_it() -> None:
    prompt = Prompt("x", (1,), (1,), meta={"low": 5, "high": 12, "floor": -9.0})
    rewarded = [number for number in range(20) if log_reward(prompt, str(number), []) == 0.0]
    assert rewarded == list(range(5, 13))


@pytest.mark.parametrize("tokenizer", ["tiny", "smollm2"])
def test_the_listed_outcomes_are_what_the_reward_rewards(tokenizer: str, smollm2: PreTrainedTokenizerBase) -> None:
    """All strings of the support are few enough to try: those with log R = 0 are the outcomes, each once."""
    chosen = smollm2 if tokenizer == "smollm2" else TOKENIZER
    task = problem("random_number", chosen, low=3, high=25)
    [prompt], support = task.prompts, task.constraints
    digits = [token for token in support.columns.tolist() if token != support.stop_token]
    strings = [[]] + [[a] for a in digits] + [[a, b] for a in digits for b in digits]
    rewarded = {tuple(tokens) for tokens in strings if log_reward(prompt, str(chosen.decode(tokens)), tokens) == 0.0}
    assert task.outcomes is not None
    assert task.log_target_O is not None
    assert len(digits) == 10
    assert (support.min_tokens, support.max_tokens) == (0, 2)
    assert rewarded == {tuple(outcome.tokens_T.tolist()) for outcome in task.outcomes}
    assert len(task.outcomes) == len(rewarded) == 23
    assert np.exp(task.log_target_O) == pytest.approx(np.full(23, 1 / 23))
    assert chosen.decode([support.stop_token]) == "."


def test_a_number_that_is_several_tokens_or_one_is_an_outcome_in_each_of_its_ways(tmp_path: Path) -> None:
    """As in the vocabularies of GPT-2 and GPT-J: all strings over digits are tried, and those that are rewarded are listed."""
    chosen = tiny.tokenizer()
    pairs = [f"{a}{b}" for a in "12" for b in "0123456789"]
    chosen.add_tokens(pairs)
    own = {"kind": "function", "path": "system.tasks.random_number:log_reward", "every_prefix": True}
    task = problem("random_number", chosen, low=8, high=13, support="vocabulary", longest=2, reward=own, floor=-40)
    written = [token for token in task.constraints.columns.tolist() if decode(chosen, [token]).isdecimal()]
    assert len(written) == 30
    strings = [[a] for a in written] + [[a, b] for a in written for b in written]
    rewarded = {tuple(tokens) for tokens in strings if log_reward(task.prompts[0], decode(chosen, tokens), tokens) == 0.0}
    assert task.outcomes is not None
    assert rewarded == {tuple(outcome.tokens_T.tolist()) for outcome in task.outcomes}
    assert len(task.outcomes) == 2 + 4 * 2


def test_the_interval_stands_in_the_prompt() -> None:
    [prompt] = problem("random_number", low=3, high=25, prompt="from {low} to {high}: ").prompts
    assert text_of(prompt) == "from 3 to 25: "
    assert prompt.policy_tokens[0] == TOKENIZER.bos_token_id
    assert prompt.reward_tokens == prompt.policy_tokens
    assert prompt.meta == {"low": 3, "high": 25, "floor": -12.0}


def test_another_reward_has_another_target_so_nothing_is_listed() -> None:
    """Listed outcomes are compared with the uniform distribution, which only the task's own reward makes the target."""
    other = problem("random_number", reward={"kind": "lm_posterior"})
    assert (other.outcomes, other.log_target_O) == (None, None)
    assert other.reward_stop == (other.constraints.stop_token,)
    own = {"kind": "function", "path": "system.tasks.random_number:log_reward", "every_prefix": True}
    assert problem("random_number", reward=own).outcomes is not None


def test_over_the_whole_vocabulary_numbers_are_listed_and_everything_else_costs_by_its_length() -> None:
    own = {"kind": "function", "path": "system.tasks.random_number:paper_log_reward", "every_prefix": True}
    task = problem("random_number", support="vocabulary", longest=5, reward=own)
    [prompt], columns = task.prompts, set(task.constraints.columns.tolist())
    assert len(columns) > 11
    assert not columns & set(TOKENIZER.all_special_ids)
    assert task.constraints.max_tokens == 5
    assert task.outcomes is not None
    assert len(task.outcomes) == 101
    assert [paper_log_reward(prompt, text, [1] * len(text)) for text in ("", "7", "100", "101", "x")] == [-8, 8, 8, -24, -8]


@pytest.mark.parametrize(
    ("fields", "fix"),
    [({"longest": 6}, -19), ({"support": "vocabulary"}, None), ({"low": 900, "high": 1000}, -14), ({"reward.beta": 2}, -24)],
)
def test_a_floor_under_which_uniform_is_not_the_posterior_is_refused(fields: dict[str, Any], fix: int | None) -> None:
    """With the floor that the message names, everything but the numbers has next to no mass."""
    beta = fields.pop("reward.beta", 1)
    own = {"kind": "function", "path": "system.tasks.random_number:log_reward", "every_prefix": True, "beta": beta}
    with pytest.raises(ConfigError, match=r"task\.floor=-12: .*task\.support=.*task\.longest.*lower task\.floor") as caught:
        problem("random_number", reward=own, **fields)
    lower = int(str(caught.value).rpartition(" ")[2])
    assert fix in (None, lower)
    task = problem("random_number", reward=own, floor=lower, **fields)
    tokens, longest = len(task.constraints.columns) - 1, task.constraints.max_tokens
    assert task.outcomes is not None
    others = sum(tokens**length for length in range(longest + 1)) - len(task.outcomes)
    assert others * np.exp(lower / beta) < 1e-4 * len(task.outcomes) < others * np.exp((lower + 2) / beta)


def test_draws_too_short_for_the_largest_number_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"longest=2 is too short for high=100; raise longest to 3"):
        problem("random_number", longest=2)
