from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.baselines import TRUNCATION, Actions, actions_of, build, grpo, mle, ppo, rloo
from learner.states import NodeLogQ
from system.learner_config import GRPO, PPO, RLOO
from system.prefix_tree import PrefixTree
from system.trajectory import Group, Prompt, Trajectory, sampled
from tests.toy import INDEX, MAX_TOKENS, STOP, STRINGS, Toy

PROMPT = Prompt("p", (1,), (1,))


def actions(reward: list[float], log_q: list[list[float]], drawn: list[list[float]] | None = None) -> Actions:
    """Rows of equal length; NaN stands for no action."""
    log_q_KT = torch.tensor(log_q, dtype=torch.float64)
    present = ~log_q_KT.isnan()
    log_q_KT = log_q_KT.nan_to_num(0.0).requires_grad_()
    drawn_KT = log_q_KT.detach().clone() if drawn is None else torch.tensor(drawn, dtype=torch.float64)
    return Actions(log_q_KT, drawn_KT, None, present, torch.tensor(reward, dtype=torch.float64))


def test_actions_leave_out_padding_tool_tokens_and_forced_stops() -> None:
    tool = sampled([4, 5, 6], [True, False, True])
    forced = replace(sampled([4, 7]), stop="forced")
    short = replace(sampled([4]), logp_T=np.array([-0.25, -0.5], np.float32))
    rewards = (np.array([np.nan, 9, 9, 3.0]), np.array([9, 9, 6.0]), np.array([9, -2.0]))
    group = Group(PROMPT, (tool, forced, short), rewards, 0, 0)
    tree = PrefixTree.of(group.trajectories_K)
    edge_N, stop_N = -torch.arange(len(tree)).float(), -100.0 - torch.arange(len(tree)).float()
    result = actions_of(tree, tree.is_action_N, group, NodeLogQ(edge_N, stop_N), NodeLogQ(edge_N * 2, stop_N * 2), 2.0)
    at = [nodes_T.tolist() for nodes_T in tree.nodes_K]
    expected = [
        [-at[0][1], 0, -at[0][3], -100 - at[0][3]],
        [-at[1][1], -at[1][2], 0, 0],
        [-at[2][1], -100 - at[2][1], 0, 0],
    ]
    assert result.log_q_KT.tolist() == expected
    assert result.action_KT.tolist() == [[True, False, True, True], [True, True, False, False], [True, True, False, False]]
    assert result.log_base_KT is not None
    assert result.log_base_KT.tolist() == [[2 * value for value in row] for row in expected]
    assert result.log_drawn_KT[2].tolist() == [-0.25, -0.5, 0, 0]
    assert result.reward_K.tolist() == [1.5, 3.0, -1.0]


def test_mle_is_the_mean_over_the_actions_and_not_over_the_trajectories() -> None:
    nan = float("nan")
    subject = actions([5.0, -5.0], [[-1, -2, -3], [-4, nan, nan]])
    assert mle(subject).item() == pytest.approx(10 / 4)


def test_grpo_weighs_each_action_by_the_standardised_reward_of_its_trajectory() -> None:
    nan = float("nan")
    subject = actions([1.0, 2.0, 6.0], [[-1, -2, -3], [-1, nan, nan], [-2, -1, nan]])
    grpo(subject, clip=0.2, kl=0.0).backward()
    advantage = (np.array([1, 2, 6]) - 3) / (np.std([1, 2, 6], ddof=1) + 1e-4)
    counts, present = np.array([3, 1, 2]), subject.action_KT.double().numpy()
    assert subject.log_q_KT.grad is not None
    np.testing.assert_allclose(subject.log_q_KT.grad, -present * (advantage / counts / 3)[:, None], rtol=1e-6)


def test_ppo_weighs_every_action_alike_and_puts_the_kl_into_the_reward() -> None:
    nan = float("nan")
    subject = actions([1.0, 2.0, 6.0], [[-1, -2, -3], [-1, nan, nan], [-2, -1, nan]])
    base = torch.tensor([[-2, -2, -3], [-1, 0, 0], [-2, -3, 0]], dtype=torch.float64)
    ppo(replace(subject, log_base_KT=base), clip=0.2, kl=0.5).backward()
    reward = np.array([1 - 0.5 * 1, 2, 6 - 0.5 * 2])
    advantage = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-4)
    assert subject.log_q_KT.grad is not None
    np.testing.assert_allclose(subject.log_q_KT.grad, -subject.action_KT.double().numpy() * advantage[:, None] / 6, rtol=1e-6)


def test_the_kl_penalty_of_ppo_has_its_weight_where_all_rewards_are_equal() -> None:
    subject = actions([2.0, 2.0], [[-1.0], [-1.2]])
    base = replace(subject, log_base_KT=torch.tensor([[-1.5], [-1.2]], dtype=torch.float64))
    weak, strong = (torch.autograd.grad(ppo(base, 0.2, kl), subject.log_q_KT)[0] for kl in (0.05, 0.5))
    assert weak[0].item() > 0, "log q is above the base's"
    torch.testing.assert_close(strong, 10 * weak)


def test_grpo_stops_pushing_where_the_ratio_has_left_the_clip() -> None:
    drawn = [[-1.0, -1.0], [-1.0, -1.0]]
    # Rows: a good trajectory and a bad one. Columns: ratio far above and far below 1.
    subject = actions([1.0, -1.0], [[-0.2, -1.8], [-0.2, -1.8]], drawn)
    grpo(subject, clip=0.2, kl=0.0).backward()
    assert subject.log_q_KT.grad is not None
    pushed = subject.log_q_KT.grad != 0
    assert pushed.tolist() == [[False, True], [True, False]]


def test_the_kl_penalty_of_grpo_is_zero_at_the_base_and_pulls_towards_it() -> None:
    subject = actions([1.0, 2.0], [[-1.0], [-3.0]])
    plain = grpo(subject, 0.2, 0.0).item()
    at_base = replace(subject, log_base_KT=subject.log_q_KT.detach())
    assert grpo(at_base, 0.2, 5.0).item() == pytest.approx(plain)
    away = replace(subject, log_base_KT=torch.tensor([[-2.0], [-2.0]], dtype=torch.float64))
    (with_kl,) = torch.autograd.grad(grpo(away, 0.2, 5.0), subject.log_q_KT)
    (without,) = torch.autograd.grad(grpo(away, 0.2, 0.0), subject.log_q_KT)
    # Descending the gradient lowers log q where it is above the base's, and raises it where it is below.
    assert (with_kl - without).sign().flatten().tolist() == [1, -1]


def test_the_kl_penalty_of_grpo_is_the_estimate_of_kl_to_the_base_from_samples_of_q() -> None:
    """Of actions that are all alike in reward: e^a - a - 1 with a = log base - log q, which is not even in a."""
    nan = float("nan")
    subject = actions([2.0, 2.0], [[-1.0, -0.5], [-3.0, nan]])
    base = replace(subject, log_base_KT=torch.tensor([[-2.0, -0.2], [-2.5, 0.0]], dtype=torch.float64))
    first, second, third = (np.exp(away) - away - 1 for away in (-1.0, 0.3, 0.5))
    assert grpo(base, 0.2, 5.0).item() == pytest.approx(5.0 * ((first + second) / 2 + third) / 2)


def test_rloo_compares_each_sample_with_the_mean_of_the_others() -> None:
    subject = actions([1.0, 2.0, 6.0], [[-1, -2], [-1, -1], [-2, -1]])
    rloo(subject, kl=0.0).backward()
    advantage = np.array([1 - 4, 2 - 3.5, 6 - 1.5])
    assert subject.log_q_KT.grad is not None
    np.testing.assert_allclose(subject.log_q_KT.grad, np.repeat(-advantage[:, None] / 3, 2, 1))


def test_rloo_weighs_what_an_earlier_policy_drew_up_to_a_bound() -> None:
    subject = actions([1.0, 2.0, 6.0], [[-1, -2], [-1, -1], [-2, -1]], [[-1, -1.5], [-3, -1], [-2, -1]])
    rloo(subject, kl=0.0).backward()
    weight = np.array([np.exp(-0.5), TRUNCATION, 1.0])  # the second would be e²
    advantage = weight * np.array([1 - 4, 2 - 3.5, 6 - 1.5])
    assert subject.log_q_KT.grad is not None
    np.testing.assert_allclose(subject.log_q_KT.grad, np.repeat(-advantage[:, None] / 3, 2, 1))


class OnPolicy:
    """The toy, sampled by its own policy and scored with its own log-probs."""

    def __init__(self, seed: int) -> None:
        self.toy, self.rng = Toy(seed=seed), np.random.default_rng(seed)
        self.base = [self.toy.log_probs(prompt).detach() for prompt in range(2)]
        self.optimizer = torch.optim.Adam([self.toy.logits], lr=0.03)

    def actions(self, prompt: int, samples: int) -> Actions:
        strings = self.toy.sample(prompt, samples, self.rng, uniform=False)
        group = self.toy.group(prompt, strings)
        stops = ["forced" if len(s) == MAX_TOKENS else "sampled" for s in strings]
        tables = (self.toy.log_probs(prompt), self.base[prompt])
        drawn = [self.steps(tables[0].detach(), s).numpy().astype(np.float32) for s in strings]
        trajectories = tuple(
            Trajectory(t.tokens_T, t.is_action_T, logp_T, stop)  # type: ignore[arg-type]
            for t, logp_T, stop in zip(group.trajectories_K, drawn, stops, strict=True)
        )
        group = replace(group, trajectories_K=trajectories)
        tree = PrefixTree.of(trajectories)
        log_q, log_base = (self.nodes(tree, table) for table in tables)
        return actions_of(tree, tree.is_action_N, group, log_q, log_base, 1.0)

    @staticmethod
    def steps(table: torch.Tensor, string: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([table[INDEX[string[:t]], a] for t, a in enumerate([*string, STOP])]).clamp(min=-1e4)

    @staticmethod
    def nodes(tree: PrefixTree, table: torch.Tensor) -> NodeLogQ:
        strings: list[tuple[int, ...]] = [()]
        for node in range(1, len(tree)):
            strings.append((*strings[tree.parent_N[node]], int(tree.token_N[node])))
        edge = [table.new_zeros(())] + [table[INDEX[s[:-1]], s[-1]] for s in strings[1:]]
        return NodeLogQ(torch.stack(edge), torch.stack([table[INDEX[s], STOP] for s in strings]))


def test_rloo_with_a_kl_to_the_base_ends_at_the_tilted_base() -> None:
    """The optimum of E[R] - b KL(q || base) is base * exp(R / b), known here by enumeration, for two prompts."""
    subject, kl = OnPolicy(0), 2.0
    for _ in range(400):
        subject.optimizer.zero_grad()
        sum(rloo(subject.actions(prompt, 48), kl) for prompt in range(2)).backward()  # type: ignore[union-attr]
        subject.optimizer.step()
    for prompt in range(2):
        base = [float(OnPolicy.steps(subject.base[prompt], s).sum()) for s in STRINGS]
        weights = np.exp(np.array(base) + subject.toy.log_reward[prompt] / kl - 10.0)
        tilted = weights / weights.sum()
        q = subject.toy.log_q(prompt).detach().exp().numpy()
        assert 0.5 * np.abs(q - tilted).sum() < 0.06
        assert 0.5 * np.abs(q - np.exp(base)).sum() > 0.1


def test_grpo_ends_at_the_best_string_and_not_at_the_posterior() -> None:
    subject = OnPolicy(1)
    for _ in range(250):
        subject.optimizer.zero_grad()
        sum(grpo(subject.actions(prompt, 32), 0.2, 0.0) for prompt in range(2)).backward()  # type: ignore[union-attr]
        subject.optimizer.step()
    for prompt in range(2):
        q = subject.toy.log_q(prompt).detach().exp().numpy()
        best = int(np.argmax(subject.toy.log_reward[prompt]))
        assert q[best] > 0.8 > subject.toy.target(prompt)[best]


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_a_section_is_built_with_its_own_settings(kl: float) -> None:
    subject = actions([1.0, 2.0, 6.0], [[-0.2, -1.8], [-1.0, -0.4], [-2.0, -1.0]], [[-1.0, -1.0]] * 3)
    subject = replace(subject, log_base_KT=torch.full((3, 2), -1.5, dtype=torch.float64))
    wanted = (
        (GRPO(clip=0.4, kl=kl), grpo(subject, 0.4, kl)),
        (PPO(clip=0.4, kl=kl), ppo(subject, 0.4, kl)),
        (RLOO(kl=kl), rloo(subject, kl)),
    )
    # Without a KL, GRPO and PPO of samples of one length are the same.
    assert len({round(loss.item(), 6) for _, loss in wanted}) == (3 if kl else 2)
    for section, loss in wanted:
        built = build(section)
        assert built is not None
        assert built.needs_base == (kl > 0)
        assert built.loss(subject).item() == loss.item()
