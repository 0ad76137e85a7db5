"""What is sampled next: a pure function of the group's number."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.requests import Requests, evaluation_request
from system.sampler_config import Exploration
from system.trajectory import Behaviour, Prompt

PROMPTS = [Prompt(f"prompt-{index}", (1,), (1,)) for index in range(7)]


def stream(seed: int = 0, exploration: Exploration | None = None, samples: int = 4, prompts: int = 7) -> Requests:
    return Requests(PROMPTS[:prompts], samples, exploration or Exploration(epsilon=0.1), seed, 9)


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(0, 50))
def test_every_prompt_comes_exactly_once_an_epoch(seed: int, prompts: int, epoch: int) -> None:
    requests = stream(seed, prompts=prompts)
    ids = [requests.training(epoch * prompts + index).prompt.id for index in range(prompts)]
    assert sorted(ids) == [prompt.id for prompt in PROMPTS[:prompts]]


def test_epochs_come_in_different_orders() -> None:
    requests = stream()
    orders = {tuple(requests.training(epoch * 7 + index).prompt.id for index in range(7)) for epoch in range(10)}
    assert len(orders) == 10


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_same_number_gives_the_same_request_to_whoever_asks_whenever(seed: int, group_id: int) -> None:
    asked_before = stream(seed)
    asked_before.training(group_id + 1)
    assert asked_before.training(group_id) == stream(seed).training(group_id)
    assert stream(seed).training(group_id).group_id == group_id


def test_groups_and_runs_have_seeds_and_temperatures_of_their_own() -> None:
    requests = [stream(seed).training(group_id) for seed in (0, 1) for group_id in range(50)]
    assert len({request.seed for request in requests}) == 100
    assert all(0 <= request.seed < 2**31 for request in requests)
    assert len({request.behaviours_K for request in requests}) == 100


@given(
    st.floats(0, 1),
    st.integers(2, 64),
    st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)).map(sorted),
    st.floats(0.01, 0.9),
)
def test_the_on_policy_share_is_exact_and_the_others_explore(
    share: float, samples: int, temperature: list[float], epsilon: float
) -> None:
    low, high = temperature
    exploration = Exploration(on_policy=share, epsilon=epsilon, temperature=(low, high))
    behaviours = stream(exploration=exploration, samples=samples).training(3).behaviours_K
    exploring = [behaviour for behaviour in behaviours if behaviour != Behaviour()]
    assert len(behaviours) == samples
    assert len(exploring) == samples - round(share * samples)
    assert all(low <= behaviour.temperature <= high and behaviour.epsilon == epsilon for behaviour in exploring)


def test_with_a_horizon_the_exploring_share_falls_to_none_and_what_is_planted_with_it() -> None:
    prompts = [replace(prompt, hints=((4,),)) for prompt in PROMPTS]
    requests = Requests(prompts, 16, Exploration(on_policy=0.25, epsilon=0.1, planted=0.5, horizon=60), 0, 5)
    asked = {group_id: requests.training(group_id).behaviours_K for group_id in (0, 20, 40, 60, 1000)}
    exploring = {group_id: sum(b != Behaviour() for b in behaviours) for group_id, behaviours in asked.items()}
    planted = {group_id: sum(bool(b.planted) for b in behaviours) for group_id, behaviours in asked.items()}
    assert exploring == {0: 12, 20: 8, 40: 4, 60: 0, 1000: 0}
    assert planted == {0: 6, 20: 4, 40: 2, 60: 0, 1000: 0}
    assert all(len(behaviours) == 16 for behaviours in asked.values())


def test_temperatures_fill_their_interval() -> None:
    exploration = Exploration(on_policy=0.0, temperature=(0.5, 2.0))
    drawn = [b.temperature for b in stream(exploration=exploration, samples=3000).training(0).behaviours_K]
    quarters = Counter(int((value - 0.5) / 0.375) for value in drawn)
    assert sorted(quarters) == [0, 1, 2, 3]
    assert all(650 < count < 850 for count in quarters.values())


@given(st.integers(0, 10**6), st.integers(6, 12), st.permutations([(4, 5), (6,), (7, 8, 9)]))
def test_hints_are_planted_whole_in_places_of_their_own_into_the_wanted_share(
    seed: int, max_tokens: int, hints: list[tuple[int, ...]]
) -> None:
    prompts = [replace(prompt, hints=tuple(hints)) for prompt in PROMPTS]
    exploration = Exploration(on_policy=0.5, epsilon=0.1, planted=0.5)
    behaviours = Requests(prompts[:1], 16, exploration, seed, max_tokens).training(0).behaviours_K
    planted = [dict(behaviour.planted) for behaviour in behaviours if behaviour.planted]
    assert len(planted) == 4 and behaviours.count(Behaviour()) == 8
    for tokens in planted:
        assert len(tokens) == 6 and set(tokens) <= set(range(max_tokens))
        for hint in hints:
            [start] = [depth for depth, token in tokens.items() if token == hint[0]]
            assert tuple(tokens[start + index] for index in range(len(hint))) == hint


def test_hints_reach_every_place_and_order_and_are_left_out_where_they_do_not_fit() -> None:
    prompts = [replace(PROMPTS[0], hints=((4, 5), (6,)))]
    exploration = Exploration(on_policy=0.0, planted=1.0)
    drawn = [b.planted for b in Requests(prompts, 500, exploration, 0, 4).training(0).behaviours_K]
    # Two ways to order them, and three to let one place of four free.
    assert len(set(drawn)) == 6 and {depth for planted in drawn for depth, _ in planted} == {0, 1, 2, 3}
    for max_tokens in (0, 2):
        assert not any(b.planted for b in Requests(prompts, 8, exploration, 0, max_tokens).training(0).behaviours_K)


def test_evaluation_is_on_policy_and_no_group_of_the_training() -> None:
    asked = [evaluation_request(prompt, index, 5, seed=0, round_=0) for index, prompt in enumerate(PROMPTS)]
    assert [request.prompt.id for request in asked] == [prompt.id for prompt in PROMPTS]
    assert all(request.behaviours_K == (Behaviour(),) * 5 for request in asked)
    assert len({request.group_id for request in asked}) == 7
    assert all(request.group_id < 0 for request in asked)


def test_evaluations_repeat_within_a_round_and_differ_between_rounds_and_runs() -> None:
    def seeds(seed: int, round_: int) -> list[int]:
        return [evaluation_request(prompt, at, 5, seed=seed, round_=round_).seed for at, prompt in enumerate(PROMPTS)]

    assert seeds(0, 0) == seeds(0, 0)
    assert len({*seeds(0, 0), *seeds(0, 10), *seeds(1, 0)}) == 3 * len(PROMPTS)


def test_without_prompts_there_is_nothing_to_ask() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        Requests([], 4, Exploration(), 0, 9)
