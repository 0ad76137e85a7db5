"""The losses against exact enumeration: two prompts of different Z, on and off policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner import losses
from learner.losses import Loss, States
from system.learner_config import PPO, DetailedBalance, Pooled, SubTB, TrajectoryBalance, VarGrad
from tests.toy import STRINGS, Toy

SECTIONS = {"pooled": Pooled, "vargrad": VarGrad, "tb": TrajectoryBalance, "db": DetailedBalance, "subtb": SubTB}
KINDS = list(SECTIONS)


def built(kind: str, decay: float = 1.0) -> Loss:
    return losses.build(SubTB(decay=decay) if kind == "subtb" else SECTIONS[kind]())


def brute_force(states: States, pairs: list[tuple[tuple[int, int], tuple[int, int], float]]) -> float:
    """Weighted mean of (u_i - u_j)^2 over pairs ((k, t), (k', t'), weight), by a loop."""
    total = sum(weight for _, _, weight in pairs)
    u_KT = states.u_KT.detach().numpy()
    return sum(w * float(u_KT[i] - u_KT[j]) ** 2 for i, j, w in pairs) / total


def scattered(toy: Toy) -> Toy:
    """With a random policy."""
    with torch.no_grad():
        toy.logits.copy_(torch.randn(toy.logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return toy


@pytest.fixture
def toy() -> Toy:
    return scattered(Toy())


@pytest.mark.parametrize("min_tokens", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_vanish_at_the_exact_posterior(kind: str, min_tokens: int) -> None:
    toy = Toy(min_tokens)
    toy.set_to_posterior()
    for prompt in range(2):
        group = toy.group(prompt, [s for s in STRINGS if toy.terminable(s)])
        loss = built(kind)(toy.states(prompt, group))
        (gradient,) = torch.autograd.grad(loss, toy.logits)
        assert loss.item() == pytest.approx(0.0, abs=1e-10)
        assert gradient.abs().max().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("min_tokens", [0, 1])
def test_u_equals_log_z_at_every_state_of_the_posterior(min_tokens: int) -> None:
    toy = Toy(min_tokens)
    toy.set_to_posterior()
    for prompt in range(2):
        states = toy.states(prompt, toy.group(prompt, [s for s in STRINGS if toy.terminable(s)]))
        assert states.u_KT[states.terminable_KT].detach().numpy() == pytest.approx(toy.log_z(prompt), abs=1e-5)


@pytest.mark.parametrize("min_tokens", [0, 1])
@pytest.mark.parametrize("drawn_by", ["policy", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_the_posterior_of_both_prompts_whoever_samples(kind: str, drawn_by: str, min_tokens: int) -> None:
    toy, rng = Toy(min_tokens), np.random.default_rng(0)
    loss_of = built(kind)
    optimizer = torch.optim.Adam([toy.logits], lr=0.1)
    steps = 250
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1.0 - step / steps) + 1e-3
        groups = [toy.group(prompt, toy.sample(prompt, 24, rng, drawn_by == "uniform")) for prompt in range(2)]
        optimizer.zero_grad()
        torch.stack([loss_of(toy.states(prompt, group)) for prompt, group in enumerate(groups)]).mean().backward()
        optimizer.step()
    assert max(toy.total_variation(prompt) for prompt in range(2)) < 0.01


def test_a_lower_reward_temperature_sharpens_the_target(toy: Toy) -> None:
    optimizer = torch.optim.Adam([toy.logits], lr=0.1)
    group = toy.group(0, STRINGS)
    for _ in range(200):
        optimizer.zero_grad()
        losses.pooled(toy.states(0, group, temperature=0.5)).backward()
        optimizer.step()
    assert toy.log_q(0).detach().exp().numpy() == pytest.approx(toy.target(0, temperature=0.5), abs=0.01)


def test_pooled_is_the_mean_over_all_pairs_of_distinct_states(toy: Toy) -> None:
    strings = [(0, 1, 1), (0, 1), (0, 1), (1,), ()]
    states = toy.states(0, toy.group(0, strings))
    places: dict[tuple[int, ...], tuple[int, int]] = {}
    for k, string in enumerate(strings):
        for t in range(len(string) + 1):
            places.setdefault(string[:t], (k, t))
    spots = list(places.values())
    pairs = [(i, j, 1.0) for a, i in enumerate(spots) for j in spots[a + 1 :]]
    assert losses.pooled(states).item() == pytest.approx(brute_force(states, pairs), rel=1e-6)


def test_vargrad_is_the_mean_over_all_pairs_of_ends(toy: Toy) -> None:
    strings = [(0, 1, 1), (0, 1), (0, 1), ()]
    states = toy.states(0, toy.group(0, strings))
    ends = [(k, len(s)) for k, s in enumerate(strings)]
    pairs = [(i, j, 1.0) for a, i in enumerate(ends) for j in ends[a + 1 :]]
    assert losses.vargrad(states).item() == pytest.approx(brute_force(states, pairs), rel=1e-6)


@pytest.fixture(params=[0, 1], ids=["root stops", "root goes on"])
def rooted(request: pytest.FixtureRequest) -> Toy:
    """Where the root cannot stop, the mean of u at the ends stands for it."""
    return scattered(Toy(request.param))


def with_root(states: States) -> States:
    """u at the root as pairs of one trajectory have it."""
    if bool(states.terminable_KT[:, 0].all()):
        return states
    return replace(states, u_KT=torch.cat([states.u_end_K.mean().expand(len(states.u_KT), 1), states.u_KT[:, 1:]], 1))


@pytest.mark.parametrize("decay", [0.3, 0.9, 1.0])
def test_subtb_weighs_each_distinct_ancestor_pair_by_distance(rooted: Toy, decay: float) -> None:
    strings = [(0, 1, 1), (1, 0, 0), (1, 0, 1)]
    states = rooted.states(0, rooted.group(0, strings))
    pairs, seen = [], set()
    for k, s in enumerate(strings):
        for j in range(1, len(s) + 1):
            if s[:j] not in seen:
                pairs += [((k, i), (k, j), decay ** (j - i - 1)) for i in range(j)]
            seen.add(s[:j])
    expected = brute_force(with_root(states), pairs)
    assert losses.subtrajectory_balance(states, decay).item() == pytest.approx(expected, rel=1e-6)


def test_detailed_balance_is_the_mean_over_edges_of_the_tree(rooted: Toy) -> None:
    states = rooted.states(0, rooted.group(0, [(0, 1, 1), (0, 1, 0)]))
    edges = [((0, 0), (0, 1), 1.0), ((0, 1), (0, 2), 1.0), ((0, 2), (0, 3), 1.0), ((1, 2), (1, 3), 1.0)]
    assert losses.detailed_balance(states).item() == pytest.approx(brute_force(with_root(states), edges), rel=1e-6)


def test_trajectory_balance_compares_root_and_end(rooted: Toy) -> None:
    strings = [s for s in ((0, 1, 1), (1,), ()) if rooted.terminable(s)]
    states = rooted.states(0, rooted.group(0, strings))
    pairs = [((k, 0), (k, len(s)), 1.0) for k, s in enumerate(strings) if s]
    assert losses.trajectory_balance(states).item() == pytest.approx(brute_force(with_root(states), pairs), rel=1e-6)


@pytest.mark.parametrize("kind", ["tb", "db", "subtb"])
def test_the_estimate_at_a_root_that_cannot_stop_is_a_constant_to_the_gradient(kind: str) -> None:
    toy = scattered(Toy(min_tokens=1))
    states = toy.states(0, toy.group(0, [(0, 1, 1), (1, 0), (1,)]))
    fixed = with_root(states)
    fixed = replace(
        fixed,
        u_KT=torch.cat([fixed.u_KT[:, :1].detach(), states.u_KT[:, 1:]], 1),
        terminable_KT=torch.cat([torch.ones_like(states.terminable_KT[:, :1]), states.terminable_KT[:, 1:]], 1),
    )
    found, expected = (torch.autograd.grad(built(kind)(each), toy.logits, retain_graph=True) for each in (states, fixed))
    torch.testing.assert_close(found, expected)


def test_states_without_a_reward_take_part_in_no_pair(toy: Toy) -> None:
    group = toy.group(0, [(0, 1, 1), (1, 0, 1)])
    known = [np.where([True, False, True, True], values, np.nan) for values in group.log_reward_K]
    states = toy.states(0, type(group)(group.prompt, group.trajectories_K, tuple(known), 0, 0))
    pairs = [((k, i), (k, j), 1.0) for k in range(2) for i, j in ((0, 2), (2, 3), (0, 3))]
    assert losses.subtrajectory_balance(states, 1.0).item() == pytest.approx(brute_force(states, pairs), rel=1e-6)
    neighbours = [((k, i), (k, j), 1.0) for k in range(2) for i, j in ((0, 2), (2, 3))]
    assert losses.detailed_balance(states).item() == pytest.approx(brute_force(states, neighbours), rel=1e-6)


@pytest.mark.parametrize("kind", ["pooled", "vargrad"])
def test_terminal_rewards_alone_suffice_for_the_losses_across_a_group(kind: str) -> None:
    toy, rng = Toy(), np.random.default_rng(0)
    optimizer = torch.optim.Adam([toy.logits], lr=0.1)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.1 * (1.0 - step / 250) + 1e-3
        optimizer.zero_grad()
        for prompt in range(2):
            group = toy.group(prompt, toy.sample(prompt, 24, rng, uniform=True))
            ends = tuple(np.where(np.arange(len(v)) == len(v) - 1, v, np.nan) for v in group.log_reward_K)
            states = toy.states(prompt, type(group)(group.prompt, group.trajectories_K, ends, 0, 0))
            built(kind)(states).backward()
        optimizer.step()
    assert max(toy.total_variation(prompt) for prompt in range(2)) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_with_no_pair_costs_nothing_and_has_a_gradient(kind: str, toy: Toy) -> None:
    loss = built(kind)(toy.states(0, toy.group(0, [()])))
    loss.backward()
    assert loss.item() == 0.0


def test_a_policy_gradient_is_no_loss_on_states() -> None:
    with pytest.raises(ValueError, match="'ppo' is no loss on states"):
        losses.build(PPO())


def test_each_kind_is_its_own_loss(toy: Toy) -> None:
    states = toy.states(0, toy.group(0, [(0, 1, 1), (1, 0), (1,)]))
    expected = {
        "pooled": losses.pooled(states),
        "vargrad": losses.vargrad(states),
        "tb": losses.trajectory_balance(states),
        "db": losses.detailed_balance(states),
        "subtb": losses.subtrajectory_balance(states, 0.5),
    }
    values = {kind: loss.item() for kind, loss in expected.items()}
    assert {kind: built(kind, decay=0.5)(states).item() for kind in KINDS} == values
    assert len({round(value, 6) for value in values.values()}) == len(KINDS)


def test_losses_that_learn_from_states_inside_samples_are_known_for_it(toy: Toy) -> None:
    """For others the rewards of these states are not computed at all."""
    group = toy.group(0, [(0, 1, 1), (1, 0), (1,)])
    ends = tuple(np.append(np.full(len(values) - 1, np.nan), values[-1]) for values in group.log_reward_K)
    known, unknown = toy.states(0, group), toy.states(0, replace(group, log_reward_K=ends))
    learns = [kind for kind in KINDS if built(kind)(known).item() != built(kind)(unknown).item()]
    assert sorted(learns) == sorted(kind for kind, section in SECTIONS.items() if section.prefix_rewards != "unused")
