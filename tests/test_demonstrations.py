from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from deploy.job import sources
from system import demonstrations
from system.config import ConfigError
from system.config_file import parse
from system.constraints import Constraints
from system.requests import Requests, evaluation_request
from system.scores import Scores
from system.tasks.problem import Problem
from system.trajectory import Prompt, Trajectory, sampled
from tests.fakes import PROMPTS, FakeSamplers

SHOWN = {"prompt-0": (sampled([3, 4]), sampled([5])), "prompt-2": (sampled([6]),)}
PROBLEM = Problem(PROMPTS, Constraints.of(stop_token=0, min_tokens=1, max_tokens=4, vocab_size=9), (0,), demonstrations=SHOWN)


class Lengths:
    """log R of stopping after t tokens is -t."""

    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
        future: Future[Scores] = Future()
        future.set_result(Scores([-np.arange(len(trajectory) + 1.0) for trajectory in trajectories_K]))
        return future


def test_prompts_with_demonstrations_become_groups_with_rewards() -> None:
    groups = demonstrations.scored(PROBLEM, Lengths())
    assert [group.prompt.id for group in groups] == ["prompt-0", "prompt-2"]
    assert [values.tolist() for values in groups[0].log_reward_K] == [[0, -1, -2], [0, -1]]


class Faulty(Lengths):
    """Some of prompt-0 and all of prompt-2 have no reward."""

    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
        future: Future[Scores] = Future()
        scores = super().log_reward(prompt, trajectories_K).result()
        future.set_result(replace(scores, faults={0: f"{prompt.id}: log of zero"}))
        return future


def test_a_demonstration_without_a_reward_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    [group] = demonstrations.scored(PROBLEM, Faulty())
    assert (group.prompt.id, group.trajectories_K) == ("prompt-0", SHOWN["prompt-0"][1:])
    assert [values.tolist() for values in group.log_reward_K] == [[0, -1]]
    assert "2 demonstrations are left out, as they have no reward; the first: prompt-0: log of zero" in caplog.text
    few = replace(PROBLEM, demonstrations={"prompt-2": SHOWN["prompt-2"]})
    with pytest.raises(ConfigError, match="no demonstration has a reward; the first that has none: prompt-2: log of zero"):
        demonstrations.scored(few, Faulty())


def test_how_many_demonstrations_are_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    demonstrations.scored(PROBLEM, Lengths())
    assert not caplog.text
    lossy = replace(PROBLEM, undrawable=3, why_undrawable="'line-1', 'a?': too odd")
    demonstrations.scored(lossy, Lengths())
    assert "3 demonstrations are left out, and 3 kept: the policy cannot draw them; the first: 'line-1', 'a" in caplog.text
    with pytest.raises(ConfigError, match=r"no prompt has a demonstration .* \(3 cannot be drawn; the first: 'line-1'"):
        demonstrations.scored(replace(lossy, demonstrations={}), Lengths())


def test_a_task_without_demonstrations_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no prompt has a demonstration .* loss.kind=mle"):
        demonstrations.scored(replace(PROBLEM, demonstrations={}), Lengths())


def test_training_requests_get_demonstrations_and_evaluations_the_real_samplers() -> None:
    samplers = FakeSamplers()
    groups = demonstrations.scored(PROBLEM, Lengths())
    source = demonstrations.Demonstrations(groups, samplers, lambda: 7)
    exploration = parse({"task": {"kind": "random_number"}}).sampler.exploration
    requests = Requests([group.prompt for group in groups], 4, exploration, 0, 4)
    source.publish(7)
    seen = [source.sample(requests.training(number)).result() for number in range(4)]
    assert {group.prompt.id for group in seen} == set(SHOWN)
    assert [(group.group_id, group.adapter_version) for group in seen] == [(number, 7) for number in range(4)]
    assert all(group.trajectories_K == SHOWN[group.prompt.id] for group in seen)
    assert not samplers.issued
    assert len(source.sample(evaluation_request(PROMPTS[0], 0, 3, seed=0, round_=0)).result()) == 3
    assert samplers.issued == [-1]
    assert samplers.version == 7


class Rewarding(FakeSamplers, Lengths): ...


@pytest.mark.parametrize("buffered", [False, True])
def test_the_buffer_starts_with_the_demonstrations_unless_a_checkpoint_fills_it(buffered: bool) -> None:
    cfg = parse({"task": {"kind": "random_number"}, "replay": {"fresh": 0.5, "uniform": 0.5, "demonstrations": True}})
    samplers = Rewarding()
    requests, pool, replay = sources(cfg, PROBLEM, samplers, lambda: 0, buffered=buffered)  # type: ignore[arg-type]
    assert (requests.prompts, requests.max_tokens) == (PROMPTS, 4)
    assert (pool, len(replay)) == (samplers, 0 if buffered else 3)


@pytest.mark.parametrize("buffered", [False, True])
def test_imitation_asks_for_prompts_with_demonstrations_and_has_these_in_place_of_samples(buffered: bool) -> None:
    cfg = parse({"task": {"kind": "random_number"}, "loss": {"kind": "mle"}})
    samplers = Rewarding()
    requests, pool, _ = sources(cfg, PROBLEM, samplers, lambda: 7, buffered=buffered)  # type: ignore[arg-type]
    assert [prompt.id for prompt in requests.prompts] == list(SHOWN)
    group = pool.sample(requests.training(0)).result()
    assert (group.trajectories_K, group.adapter_version) == (SHOWN[group.prompt.id], 7)
    assert not samplers.issued
