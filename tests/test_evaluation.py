"""What an evaluation makes of samples and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest

from system import evaluation
from system.evaluation import Evaluation, Judge
from system.handles import GroupLogQ
from system.posterior import effective_share, log_mean_exp
from system.run_error import RunError
from system.trajectory import Group, sampled
from tests.fakes import PROMPTS, FakeSamplers
from tests.test_group_flow import Lossy


class Scores:
    """log q of the samples of a group is -1, -2, …"""

    def score(self, groups: Sequence[Group]) -> Future[list[GroupLogQ]]:
        answer: Future[list[GroupLogQ]] = Future()
        answer.set_result([GroupLogQ(-np.arange(1.0, len(group) + 1), np.zeros(len(group))) for group in groups])
        return answer


def spelled(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def evaluated(samplers: FakeSamplers, temperature: float = 1.0, judge: Judge = lambda group: {}) -> Evaluation:
    samplers.publish(0)
    return evaluation.sampled(
        PROMPTS, samplers, Scores(), samples=4, temperature=temperature, seed=0, round_=0, decode=spelled, judge=judge
    )


def test_bounds_are_at_the_temperature_of_the_reward() -> None:
    result = evaluated(FakeSamplers(), 0.5)
    assert len(result.per_prompt) == 3
    for row in result.per_prompt:
        mine = [sample for sample in result.samples if sample["prompt"] == row["prompt"]]
        u_K = np.array([sample["log_reward"] / 0.5 - sample["log_q"] for sample in mine])
        assert (row["log_z_lower"], row["log_z_weighted"]) == pytest.approx((u_K.mean(), log_mean_exp(u_K)))


def test_a_prompt_with_a_single_sample_left_has_no_bounds_and_what_is_lost_counts_for_the_task() -> None:
    result = evaluated(Lossy({-1: 3}), judge=lambda group: {"right": len(group) / group.drawn})
    assert [row["prompt"] for row in result.per_prompt] == ["prompt-1", "prompt-2"]
    assert result.metrics["task/right"] == pytest.approx((0.25 + 1 + 1) / 3)
    assert result.metrics["task/unscored"] == 0.25


def test_bounds_count_what_was_drawn_and_has_no_reward() -> None:
    result = evaluated(Lossy({-1: 2, -2: 1}))
    for row, left in zip(result.per_prompt, (2, 3, 4), strict=True):
        mine = [sample for sample in result.samples if sample["prompt"] == row["prompt"]]
        u_K = np.array([sample["log_reward"] - sample["log_q"] for sample in mine])
        assert len(u_K) == left
        assert (row["log_z_weighted"], row["ess"]) == pytest.approx((log_mean_exp(u_K, 4), effective_share(u_K, 4)))


def test_a_prompt_without_any_sample_left_counts_for_the_task() -> None:
    result = evaluated(Lossy({-1: 4}), judge=lambda group: {"right": len(group) / group.drawn})
    assert result.metrics["task/right"] == pytest.approx(2 / 3)


def test_an_evaluation_without_two_samples_of_any_prompt_says_why_and_what_to_do() -> None:
    message = r"mend the reward, or draw more samples .*; the first without one: log of zero"
    with pytest.raises(RunError, match=message):
        evaluated(Lossy({-1: 3, -2: 4, -3: 3}))


def test_what_factors_of_the_reward_say_is_told_of_samples_prompts_and_all() -> None:
    result = evaluated(FakeSamplers())
    sums = {row["prompt"]: [] for row in result.per_prompt}
    for sample in result.samples:
        sums[sample["prompt"]].append(sample["reward/digits"])
        assert sample["reward/digits"] == sum(map(int, sample["text"].split()))
    means = [row["task/reward/digits"] for row in result.per_prompt]
    assert means == pytest.approx([np.mean(values) for values in sums.values()])
    assert result.metrics["task/reward/digits"] == pytest.approx(np.mean(means))


def test_different_samples_are_counted_unless_the_judge_knows_better() -> None:
    samples = tuple(sampled(list(text.encode())) for text in ("ab", "ab", "c", "d"))
    group = Group(PROMPTS[0], samples, tuple(np.zeros(len(each) + 1) - len(each) for each in samples), 0, 0)
    expected = {"task/max_log_reward": -1.0, "task/mean_log_reward": -1.5}
    assert evaluation.of_task(group, lambda group: {}) == expected | {"task/distinct": 0.75}
    assert evaluation.of_task(group, lambda group: {"distinct": 0.5}) == expected | {"task/distinct": 0.5}


def test_the_gap_of_the_engine_is_the_difference_in_whole_samples() -> None:
    # The fakes draw with a log-prob of 0 for every token.
    assert evaluated(FakeSamplers()).metrics["posterior/engine_gap"] == pytest.approx(np.mean([1, 2, 3, 4]))
