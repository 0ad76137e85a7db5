"""The data types: what they refuse, trajectories of given tokens, and how groups of one prompt become one."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from system.trajectory import Behaviour, Group, Prompt, Trajectory, merge_by_prompt, sampled


def trajectory(*tokens: int) -> Trajectory:
    return Trajectory(np.array(tokens, np.int32), np.ones(len(tokens), bool), np.zeros(len(tokens) + 1, np.float32), "sampled")


def group(prompt: str, *samples: tuple[int, ...], version: int = 0, group_id: int = 0) -> Group:
    """Rewards that say which sample they belong to."""
    rewards = tuple(np.array([*sample, 0.5], np.float64) for sample in samples)
    return Group(Prompt(prompt, (1,), (2,)), tuple(trajectory(*sample) for sample in samples), rewards, version, group_id)


def test_groups_of_one_prompt_become_one_in_order() -> None:
    groups = [
        group("b", (1, 2), (), version=5, group_id=10),
        group("a", (3,), version=7, group_id=11),
        group("b", (1, 2), (4,), version=3, group_id=12),
    ]
    merged = merge_by_prompt(groups)
    assert [(one.prompt.id, one.group_id, one.adapter_version) for one in merged] == [("b", 10, 3), ("a", 11, 7)]
    assert [sample.tokens_T.tolist() for sample in merged[0].trajectories_K] == [[1, 2], [], [1, 2], [4]]
    assert [reward.tolist() for reward in merged[0].log_reward_K] == [[1, 2, 0.5], [0.5], [1, 2, 0.5], [4, 0.5]]
    assert (len(merged[0]), merged[0].tokens) == (4, 5)


def test_merging_loses_no_sample_and_leaves_the_groups_as_they_were() -> None:
    groups = [group("a", (1,), version=1), group("a", (2,), (3,), version=0)]
    assert [len(one) for one in merge_by_prompt(groups)] == [3]
    assert [(len(one), one.adapter_version) for one in groups] == [(1, 1), (2, 0)]
    assert merge_by_prompt([]) == []
    again = merge_by_prompt(merge_by_prompt(groups))
    assert [one.trajectories_K for one in again] == [one.trajectories_K for one in merge_by_prompt(groups)]


@pytest.mark.parametrize("contexts", [{"policy_tokens": ()}, {"reward_tokens": ()}])
def test_a_prompt_without_a_context_is_refused(contexts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prompt 'x': policy_tokens and reward_tokens need at least one"):
        Prompt(**{"id": "x", "policy_tokens": (1,), "reward_tokens": (1,)} | contexts)


@pytest.mark.parametrize(("flags", "logps"), [(1, 3), (3, 3), (2, 2), (2, 4)])
def test_a_trajectory_whose_arrays_do_not_fit_is_refused(flags: int, logps: int) -> None:
    with pytest.raises(ValueError, match=f"of 2 tokens has {flags} is_action flags and {logps} log-probs; it needs 2 and 3"):
        Trajectory(np.zeros(2, np.int32), np.ones(flags, bool), np.zeros(logps, np.float32), "forced")


def test_a_sampled_trajectory_is_of_actions_alone() -> None:
    trajectory = sampled([3, 4])
    assert trajectory.tokens_T.tolist() == [3, 4]
    assert trajectory.is_action_T.all()
    assert len(sampled([])) == 0


def test_a_sampled_trajectory_of_the_most_actions_ends_as_a_draw_does() -> None:
    """The tool's tokens do not count; without a number nothing is known to be the most."""
    tool = np.array([True, False])
    stops = [sampled(tokens, max_tokens=2).stop for tokens in ([3], [3, 4])]
    assert stops == ["sampled", "forced"]
    assert sampled([3, 4], tool, max_tokens=2).stop == "sampled"
    assert sampled([3, 4, 5], np.append(tool, True), max_tokens=2).stop == "forced"
    assert sampled([3, 4]).stop == "sampled"


def test_a_group_whose_rewards_do_not_fit_is_refused_by_prompt_and_length() -> None:
    prompt, sample = Prompt("x", (1,), (1,)), trajectory(4, 5)
    with pytest.raises(ValueError, match="1 trajectories but 0 log-rewards"):
        Group(prompt, (sample,), (), 0, 0)
    for length in (2, 4):
        with pytest.raises(ValueError, match=f"group 9, prompt 'x': .* of 2 tokens needs 3 log-rewards, got {length}"):
            Group(prompt, (sample,), (np.zeros(length),), 0, 9)


def ragged(faults: tuple[str, ...] = ()) -> Group:
    """Of an empty trajectory, a long one with a tool's output, and one that was forced to stop."""
    rng = np.random.default_rng(0)
    planted = Behaviour(0.7, 0.1, ((0, 5), (2, 6)))
    trajectories = (
        sampled([]),
        Trajectory(
            np.arange(3, dtype=np.int32), np.array([True, False, True]), rng.normal(size=4).astype(np.float32), "sampled"
        ),
        Trajectory(np.array([7], np.int32), np.array([True]), rng.normal(size=2).astype(np.float32), "forced", planted),
    )
    log_reward = tuple(
        np.where(rng.random(len(each) + 1) < 0.3, np.nan, rng.normal(size=len(each) + 1)) for each in trajectories
    )
    prompt = Prompt("a", (1, 2), (3,), (4,), {"answer": 5})
    return Group(prompt, trajectories, log_reward, 3, 9, faults, {"length": np.array([0.0, 3.0, 1.0])})


@pytest.mark.parametrize("group", [ragged(), ragged(("too late",)), Group(Prompt("b", (1,), (1,)), (), (), 0, 1, ("all",))])
def test_a_group_is_the_same_in_another_process_and_sent_as_few_arrays(group: Group) -> None:
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(group, protocol=5, buffer_callback=buffers.append)
    same = pickle.loads(content, buffers=buffers)
    assert len(buffers) == 4 + len(group.factors_K)
    for name in ("prompt", "adapter_version", "group_id", "faults"):
        assert getattr(same, name) == getattr(group, name)
    np.testing.assert_equal(dict(same.factors_K), dict(group.factors_K))
    assert len(same) == len(group)
    for got, sent in zip(same.trajectories_K, group.trajectories_K, strict=True):
        assert (got.stop, got.behaviour) == (sent.stop, sent.behaviour)
        for array in ("tokens_T", "is_action_T", "logp_T"):
            np.testing.assert_array_equal(getattr(got, array), getattr(sent, array))
            assert getattr(got, array).dtype == getattr(sent, array).dtype
    np.testing.assert_equal(list(same.log_reward_K), list(group.log_reward_K))


def test_the_reward_of_a_whole_sample_is_that_of_stopping_where_it_ends() -> None:
    log_reward = (np.array([1.0, np.nan, 3.0]), np.array([4.0]))
    found = Group(Prompt("x", (1,), (1,)), (sampled([4, 5]), sampled([])), log_reward, 0, 0)
    assert found.end_log_reward_K.tolist() == [3.0, 4.0]
    none = Group(found.prompt, (), (), 0, 0).end_log_reward_K
    assert (none.shape, none.dtype) == ((0,), np.float64)


def test_keys_tell_token_sequences_apart_and_nothing_else() -> None:
    same = Trajectory(np.array([1, 2], np.int64), np.ones(2, bool), np.ones(3, np.float32), "forced", Behaviour(2.0))
    assert trajectory(1, 2).key == same.key
    assert len({trajectory(*tokens).key for tokens in [(), (1,), (1, 2), (2, 1), (256,), (1, 0)]}) == 6


def test_nothing_that_flows_can_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        group("a", (1,)).adapter_version = 3  # type: ignore[misc]
