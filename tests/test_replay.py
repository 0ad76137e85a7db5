"""The buffer: what it keeps, what it mixes in, and that it comes back from a checkpoint as it was."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.replay import Replay
from learner.states import node_log_reward
from system.learner_config import Replay as ReplayConfig
from system.prefix_tree import PrefixTree
from system.trajectory import Behaviour, Group, Prompt, Trajectory

Sample = tuple[tuple[int, ...], float]
SAMPLES = st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=4).map(tuple), st.floats(-30, 0)), max_size=12)


def trajectory(tokens: tuple[int, ...], **fields: Any) -> Trajectory:
    n = len(tokens)
    return Trajectory(np.array(tokens, np.int32), np.ones(n, bool), np.full(n + 1, -0.5, np.float32), "sampled", **fields)


def group(samples: list[Sample], prompt: str = "a") -> Group:
    """Each sample's log R at the end; before it, NaN at the root and a number of its own elsewhere."""
    rewards = []
    for tokens, log_reward in samples:
        values = np.arange(len(tokens) + 1) - 100.0
        values[0], values[-1] = np.nan, log_reward
        rewards.append(values)
    return Group(Prompt(prompt, (1,), (1,)), tuple(trajectory(tokens) for tokens, _ in samples), tuple(rewards), 3, 7)


def buffer(samples: list[Sample] | None = None, prompt: str = "a", **config: Any) -> Replay:
    shares: dict[str, Any] = {} if config.keys() & {"fresh", "uniform", "prioritised"} else {"fresh": 0.5, "uniform": 0.5}
    replay = Replay(ReplayConfig(**shares | config))
    if samples is not None:
        replay.add(group(samples, prompt))
    return replay


def stored(replay: Replay) -> dict[str, dict[tuple[int, ...], list[float]]]:
    """{prompt: {tokens: log R at every prefix}}, by way of a checkpoint."""
    arrays, records = replay.save()
    result: dict[str, dict[tuple[int, ...], list[float]]] = {}
    at = after = 0
    for record in records:
        n = record["length"]
        tokens = tuple(arrays["tokens"][at : at + n].tolist())
        assert tokens not in result.setdefault(record["prompt"], {})
        result[record["prompt"]][tokens] = arrays["log_reward"][after : after + n + 1].tolist()
        at, after = at + n, after + n + 1
    return result


def ends(replay: Replay, prompt: str = "a") -> dict[tuple[int, ...], float]:
    return {tokens: values[-1] for tokens, values in stored(replay).get(prompt, {}).items()}


def replayed(replay: Replay, fresh: Group, seed: int = 0) -> list[tuple[int, ...]]:
    mixed = replay.mix(fresh, np.random.default_rng(seed))
    return [tuple(sample.tokens_T.tolist()) for sample in mixed.trajectories_K[len(fresh) :]]


NUMBERS: list[Sample] = [((index,), 0.0) for index in range(40)]


# --------------------------------------------------------------------------------------------------- what is kept


@given(st.lists(SAMPLES, max_size=4))
def test_each_distinct_sequence_is_kept_once_with_its_newest_reward(groups: list[list[Sample]]) -> None:
    replay, newest = buffer(capacity=1000), {}
    for samples in groups:
        replay.add(group(samples))
        newest |= dict(samples)
    assert ends(replay) == newest
    assert len(replay) == len(newest)


@given(SAMPLES, st.integers(1, 6))
def test_at_capacity_the_lowest_rewards_go(samples: list[Sample], capacity: int) -> None:
    replay = buffer(samples, capacity=capacity)
    newest = dict(samples)
    assert len(replay) == min(capacity, len(newest))
    kept = ends(replay)
    assert sorted(kept.values()) == sorted(newest.values())[-capacity:]
    assert all(newest[tokens] == log_reward for tokens, log_reward in kept.items())


def test_of_equal_rewards_the_oldest_goes() -> None:
    replay = buffer([((1,), 0.0), ((2,), 0.0), ((3,), 0.0)], capacity=3)
    replay.add(group([((1,), 0.0), ((4,), 0.0)]))  # 1 is seen again, so 2 is the oldest
    assert list(ends(replay)) == [(3,), (1,), (4,)]


def test_a_trajectory_without_a_reward_at_its_end_is_not_kept() -> None:
    assert ends(buffer([((1,), float("nan")), ((2,), 0.0)])) == {(2,): 0.0}


def test_prompts_have_buffers_of_their_own() -> None:
    replay = buffer([((1,), -1.0), ((2,), -1.0)], prompt="a", capacity=2)
    replay.add(group([((3,), 0.0), ((4,), 0.0)], prompt="b"))
    assert stored(replay).keys() == {"a", "b"}
    assert ends(replay, "a") == {(1,): -1.0, (2,): -1.0}  # b's better rewards displace nothing of a
    assert set(replayed(replay, group([((9,), 0.0)] * 4, prompt="b"))) == {(3,), (4,)}
    assert replayed(replay, group([((9,), 0.0)] * 4, prompt="c")) == []


# ---------------------------------------------------------------------------------------------------- what is mixed


@given(SAMPLES, SAMPLES.filter(bool), st.integers(0, 99))
def test_nothing_is_drawn_twice_and_nothing_fresh_is_drawn(old: list[Sample], new: list[Sample], seed: int) -> None:
    replay = buffer(old, fresh=0.2, prioritised=0.4, uniform=0.4)
    fresh = group(new)
    drawn = replayed(replay, fresh, seed)
    assert len(drawn) == len(set(drawn))
    assert not set(drawn) & {tokens for tokens, _ in new}
    assert set(drawn) <= {tokens for tokens, _ in old}


def test_the_fresh_ones_come_first_and_the_group_stays_what_it_is() -> None:
    fresh = group([((50,), -1.0), ((51,), -2.0)])
    mixed = buffer(NUMBERS).mix(fresh, np.random.default_rng(0))
    assert mixed.trajectories_K[:2] == fresh.trajectories_K
    assert len(mixed) == 4
    assert (mixed.prompt, mixed.adapter_version, mixed.group_id) == (fresh.prompt, 3, 7)
    assert len(fresh) == 2


@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_rewards_come_back_untempered_at_every_prefix(temperature: float) -> None:
    samples: list[Sample] = [((1, 2), -3.25), ((), -1.0)]
    replay = buffer(samples, fresh=0.1, prioritised=0.9, prioritised_temperature=temperature)
    mixed = replay.mix(group([((9,), 0.0)]), np.random.default_rng(0))
    found = {tuple(z.tokens_T.tolist()): r.tolist() for z, r in zip(mixed.trajectories_K, mixed.log_reward_K, strict=True)}
    assert found[(1, 2)] == pytest.approx([np.nan, -99.0, -3.25], nan_ok=True)
    assert found[()] == [-1.0]


@pytest.mark.parametrize(
    ("fresh_share", "prioritised", "uniform", "size"),
    [(0.5, 0.25, 0.25, 8), (0.75, 0.125, 0.125, 16), (0.9, 0.0, 0.1, 2), (0.8, 0.2, 0.0, 3), (0.4, 0.0, 0.6, 5)],
)
def test_shares_are_right_on_average(fresh_share: float, prioritised: float, uniform: float, size: int) -> None:
    """In a group of 2 a share of 0.1 is 0.22 of a trajectory: it must come now and then, not never."""
    replay = buffer(NUMBERS, fresh=fresh_share, prioritised=prioritised, uniform=uniform)
    fresh, draws = group([((50 + index,), 0.0) for index in range(size)]), 2000
    rng = np.random.default_rng(0)
    mean = sum(len(replay.mix(fresh, rng)) - size for _ in range(draws)) / draws
    assert mean == pytest.approx(size * (1 - fresh_share) / fresh_share, abs=0.05)


def test_the_two_shares_add_up_and_neither_takes_the_others_place() -> None:
    """Rewards that only one trajectory can win: the prioritised share takes it, and the uniform one takes others."""
    replay = buffer([((0,), 0.0), *[((index,), -500.0) for index in range(1, 9)]], fresh=0.5, prioritised=0.25, uniform=0.25)
    fresh, rng = group([((50,), 0.0), ((51,), 0.0)]), np.random.default_rng(0)
    others: Counter[int] = Counter()
    for _ in range(400):
        first, second = (int(z.tokens_T[0]) for z in replay.mix(fresh, rng).trajectories_K[2:])
        assert first == 0
        others[second] += 1
    assert sorted(others) == list(range(1, 9))
    assert all(25 < count < 80 for count in others.values())  # 50 each, a standard deviation of 6.6


def test_prioritised_draws_are_in_proportion_to_the_reward_at_its_temperature() -> None:
    log_reward = np.log([1.0, 2.0, 3.0, 4.0])
    for temperature in (1.0, 0.5):
        samples = [((index,), float(value)) for index, value in enumerate(log_reward)]
        replay = buffer(samples, fresh=0.5, prioritised=0.5, prioritised_temperature=temperature)
        rng, fresh, draws = np.random.default_rng(0), group([((50,), 0.0)]), 4000
        counts = Counter(int(replay.mix(fresh, rng).trajectories_K[1].tokens_T[0]) for _ in range(draws))
        weights = np.exp(log_reward / temperature)
        expected = draws * weights / weights.sum()
        chi_square = sum((counts[index] - expected[index]) ** 2 / expected[index] for index in range(4))
        assert chi_square < 16.3  # p = 0.001 with 3 degrees of freedom


def test_uniform_draws_ignore_the_reward() -> None:
    replay = buffer([((index,), -10.0 * index) for index in range(4)], fresh=0.5, uniform=0.5)
    rng, fresh = np.random.default_rng(0), group([((50,), 0.0)])
    counts = Counter(int(replay.mix(fresh, rng).trajectories_K[1].tokens_T[0]) for _ in range(4000))
    assert sum((counts[index] - 1000) ** 2 / 1000 for index in range(4)) < 16.3


def test_with_too_few_all_that_are_not_fresh_are_taken() -> None:
    replay = buffer([((1,), 0.0), ((2,), 0.0), ((3,), 0.0)], fresh=0.1, prioritised=0.5, uniform=0.4)
    assert sorted(replayed(replay, group([((3,), 0.0)] * 8))) == [(1,), (2,)]


def test_without_shares_or_without_a_past_the_fresh_group_is_all_there_is() -> None:
    fresh, rng = group([((9,), 0.0)] * 4), np.random.default_rng(0)
    assert buffer(NUMBERS, fresh=1.0).mix(fresh, rng).trajectories_K == fresh.trajectories_K
    assert buffer().mix(fresh, rng).trajectories_K == fresh.trajectories_K
    assert buffer([((9,), 0.0)]).mix(fresh, rng).trajectories_K == fresh.trajectories_K


def test_the_same_generator_draws_the_same() -> None:
    assert replayed(buffer(NUMBERS), group(NUMBERS[:5]), 3) == replayed(buffer(NUMBERS), group(NUMBERS[:5]), 3)


# --------------------------------------------------------------------------------------------------- checkpointing


def described(replay: Replay) -> list[tuple[Any, ...]]:
    arrays, records = replay.save()
    return [tuple(sorted(record.items())) for record in records] + [(name, arrays[name].tobytes()) for name in sorted(arrays)]


@given(SAMPLES.filter(bool), SAMPLES)
def test_a_buffer_comes_back_as_it_was(first: list[Sample], second: list[Sample]) -> None:
    replay = buffer(first, prompt="a")
    replay.add(group(second, prompt="b"))
    arrays, records = replay.save()
    again = buffer()
    again.restore({name: array.copy() for name, array in arrays.items()}, json.loads(json.dumps(records)))
    assert described(again) == described(replay)
    assert stored(again).keys() == stored(replay).keys()
    assert len(again) == len(replay)
    new = group([((9,), 0.0), ((8,), 0.0)])
    assert replayed(again, new) == replayed(replay, new)
    again.add(new)
    replay.add(new)
    assert described(again) == described(replay)


def test_all_of_a_trajectory_comes_back() -> None:
    tokens, actions = np.array([5, 70000, 6], np.int32), np.array([True, False, True])
    kept = Trajectory(tokens, actions, np.array([-1, 0, -0.25, 0], np.float32), "forced", Behaviour(1.5, 0.25, ((0, 3),)))
    log_reward_T = np.array([np.nan, -1e-9, np.nan, -7.125])
    replay = buffer()
    empty = trajectory((), behaviour=Behaviour(0.5))
    replay.add(Group(Prompt("é", (1,), (1,)), (empty, kept), (np.array([-2.0]), log_reward_T), 0, 0))
    arrays, records = replay.save()
    again = buffer(fresh=0.1, uniform=0.9)
    again.restore(arrays, json.loads(json.dumps(records)))
    fresh = Group(Prompt("é", (1,), (1,)), (trajectory((1,)),), (np.zeros(2),), 0, 0)
    mixed = again.mix(fresh, np.random.default_rng(0))
    found = {len(z): (z, r) for z, r in zip(mixed.trajectories_K[1:], mixed.log_reward_K[1:], strict=True)}
    one, reward = found[3]
    assert (one.tokens_T.tolist(), one.is_action_T.tolist(), one.logp_T.tolist()) == (
        [5, 70000, 6], [True, False, True], [-1.0, 0.0, -0.25, 0.0],
    )  # fmt: skip
    assert (one.stop, one.behaviour, one.key) == ("forced", Behaviour(1.5, 0.25, ((0, 3),)), kept.key)
    assert (one.tokens_T.dtype, one.is_action_T.dtype, one.logp_T.dtype, reward.dtype) == (
        np.int32, np.bool_, np.float32, np.float64,
    )  # fmt: skip
    assert reward.tolist() == pytest.approx(log_reward_T.tolist(), nan_ok=True, abs=0)
    assert found[0][0].behaviour == Behaviour(0.5)
    assert found[0][1].tolist() == [-2.0]


def test_an_empty_buffer_comes_back_empty() -> None:
    replay = buffer(NUMBERS)
    replay.restore(*buffer().save())
    assert len(replay) == 0


def test_a_buffer_that_nothing_is_drawn_from_stays_empty() -> None:
    assert len(buffer([((3, 4), -1.0)], fresh=1.0)) == 0
    used = buffer([((3, 4), -1.0)], fresh=0.9, uniform=0.1)
    assert len(used) == 1
    # Nor does a run that is resumed without replay carry what it once drew from.
    unused = buffer(fresh=1.0)
    unused.restore(*used.save())
    assert len(unused) == 0


def test_what_is_kept_of_a_group_is_its_own() -> None:
    """Not views, which would keep the whole group's message in memory."""
    message = np.arange(64, dtype=np.int32)
    sample = trajectory((0, 1))
    viewed = Trajectory(message[:2], sample.is_action_T, sample.logp_T, "sampled")
    replay = buffer()
    replay.add(Group(Prompt("a", (1,), (1,)), (viewed,), (np.zeros(300)[:3],), 0, 0))
    [(kept, log_reward_T, _)] = replay._prompts["a"].values()
    assert [array.base for array in (kept.tokens_T, kept.is_action_T, kept.logp_T, log_reward_T)] == [None] * 4

    replay.restore(*replay.save())
    [(kept, log_reward_T, _)] = replay._prompts["a"].values()
    assert [array.base for array in (kept.tokens_T, kept.is_action_T, kept.logp_T, log_reward_T)] == [None] * 4


def test_of_noisy_rewards_of_a_prefix_the_fresh_one_counts() -> None:
    samples = group([((0, 1), -1.0), ((0, 2), -2.0)])
    tree = PrefixTree.of(samples.trajectories_K)
    noisy = (np.array([5.0, 6.0, 7.0]), np.array([8.0, 9.0, np.nan]))
    log_reward_N = node_log_reward(tree, replace(samples, log_reward_K=noisy))
    first, second = tree.nodes_K
    assert log_reward_N[first].tolist() == [5.0, 6.0, 7.0]
    assert np.isnan(log_reward_N[second[-1]])
