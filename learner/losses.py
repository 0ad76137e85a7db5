"""The losses: pure functions of u at the states of one group. Torch only.

With C(s) the log-probability of the policy's actions on the path to s,

    u(s) = log R(s) / T - log q(stop | s) - C(s)

(T here is the reward temperature) estimates log Z of the prompt at every state that can stop, and equals it at all of them
once q is the posterior. A loss is a choice of pairs of states: it is the (weighted) mean of (u(i) - u(j))^2 over its pairs,
in nats^2, and zero iff u agrees on every pair, whoever drew the samples. It is never taken across prompts: each has a log Z of
its own. Where the root cannot stop it has no u: the mean of the group's u at the ends, detached, is put in its place by the
losses with pairs along a path (trajectory, detailed and sub-trajectory balance).

The gradient reaches the policy through log q(stop) and C. There is deliberately no learned log Z, no critic, no ratio
to the behaviour policy and no clipping: off-policy samples need none of them.

`_S`: states of a path, T + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from system import learner_config


@dataclass(frozen=True, eq=False)
class States:
    """The states of one group, along its K trajectories; T is the longest, and padding is False in `terminable_KT`."""

    u_KT: Tensor
    """float [K, T + 1], nats; finite everywhere, meaningful where terminable."""
    terminable_KT: Tensor
    """bool [K, T + 1]: the state can stop and its reward is known."""
    distinct_KT: Tensor
    """bool [K, T + 1]: one place for each distinct terminable node of the prefix tree, so that none counts twice."""
    end_K: Tensor
    """int64 [K]: where each trajectory ends."""

    def at_end(self, values_KT: Tensor) -> Tensor:
        """[K]: the value of [K, T + 1] where each trajectory ends."""
        return values_KT.gather(1, self.end_K[:, None])[:, 0]

    @property
    def u_end_K(self) -> Tensor:
        """[K']: u at the ends that are terminable. Its mean estimates log Z, its variance is the spread."""
        return self.at_end(self.u_KT)[self.at_end(self.terminable_KT)]


Loss = Callable[[States], Tensor]


def mean_over_all_pairs(u_N: Tensor) -> Tensor:
    """Mean of (u_i - u_j)^2 over all pairs i < j, without a loop: the sum over pairs is N Σu² - (Σu)² on centred u."""
    if len(u_N) < 2:
        return u_N.sum() * 0.0
    return 2.0 * (u_N - u_N.mean()).square().sum() / (len(u_N) - 1)


def pooled(states: States) -> Tensor:
    """Every terminable state with every other across the group, each distinct state once."""
    return mean_over_all_pairs(states.u_KT[states.distinct_KT])


def vargrad(states: States) -> Tensor:
    """End with end across the group: the log-partition variance.

    Source: Richter et al. 2020, arXiv:2010.10436; Zhang et al. 2023, arXiv:2302.05446, section 3.2; TBA, arXiv:2503.18929.
    """
    return mean_over_all_pairs(states.u_end_K)


def _root(states: States) -> tuple[Tensor, Tensor]:
    """(u_K, exists_K) at the start of each path. Where the root cannot stop, the mean of u at the ends estimates log Z."""
    u_K, terminable_K = states.u_KT[:, 0], states.terminable_KT[:, 0]
    if bool(terminable_K.all()) or not len(states.u_end_K):
        return u_K, terminable_K
    return states.u_end_K.mean().detach().expand_as(u_K), torch.ones_like(terminable_K)


def trajectory_balance(states: States) -> Tensor:
    """Root with end: trajectory balance with log Z = u(root) in place of a learned one.

    Source: Malkin et al. 2022, arXiv:2201.13259, with F(root) = R(root) / q(stop | root).
    """
    root_K, exists_K = _root(states)
    pair_K = states.at_end(states.terminable_KT) & exists_K & (states.end_K > 0)
    return _mean((root_K - states.at_end(states.u_KT)).square(), pair_K)


def subtrajectory_balance(states: States, decay: float) -> Tensor:
    """Ancestor with descendant, d terminable states apart, at weight decay^(d-1).

    No loop over lengths: Σ_ij W_ij (u_i - u_j)² = Σ_i u_i² ((W + Wᵀ) 1)_i - 2 uᵀ W u, with masks in place of 1.

    Source: Madan et al. 2023, arXiv:2209.12782; Hu et al. 2024, arXiv:2310.04363, Eq. 3 (decay = 1).
    """
    root_K, exists_K = _root(states)
    u_KS = torch.cat([root_K[:, None], states.u_KT[:, 1:]], 1)
    state_KS = torch.cat([exists_K[:, None], states.terminable_KT[:, 1:]], 1)
    # States that cannot stop take part in no pair: close the gaps, so that column distance counts terminable states.
    order_KS = torch.argsort((~state_KS).to(torch.int8), dim=1, stable=True)
    state_KS = state_KS.gather(1, order_KS)
    # A pair is of a state and any state above it; it counts on the one sample that has the lower one's node first.
    counted_KS = (state_KS & states.distinct_KT.gather(1, order_KS)).to(u_KS.dtype)
    u_KS = u_KS.gather(1, order_KS)
    centre_K = (u_KS * state_KS).sum(1) / state_KS.sum(1).clamp(min=1)
    u_KS = torch.where(state_KS, u_KS - centre_K.detach()[:, None], 0.0)

    at = torch.arange(u_KS.shape[1], device=u_KS.device)
    distance_SS = at[None, :] - at[:, None]
    weight_SS = torch.where(distance_SS > 0, decay ** (distance_SS - 1).clamp(min=0).to(u_KS.dtype), 0.0)
    state = state_KS.to(u_KS.dtype)
    ancestors_KS, descendants_KS = state @ weight_SS, counted_KS @ weight_SS.T
    squares = (u_KS.square() * (ancestors_KS * counted_KS + descendants_KS * state)).sum()
    cross = ((u_KS @ weight_SS) * u_KS * counted_KS).sum()
    return (squares - 2.0 * cross) / (ancestors_KS * counted_KS).sum().clamp(min=1e-12)


def detailed_balance(states: States) -> Tensor:
    """Parent with child: modified detailed balance.

    Source: Deleu et al. 2022, arXiv:2202.13903. The limit of sub-trajectory balance at decay 0.
    """
    return subtrajectory_balance(states, 0.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def build(section: learner_config.Loss) -> Loss:
    """The loss of a config section `loss`. Raises ValueError for one that is none of these."""
    match section:
        case learner_config.Pooled():
            return pooled
        case learner_config.VarGrad():
            return vargrad
        case learner_config.TrajectoryBalance():
            return trajectory_balance
        case learner_config.DetailedBalance():
            return detailed_balance
        case learner_config.SubTB(decay=decay):
            return partial(subtrajectory_balance, decay=decay)
        case _:
            raise ValueError(f"loss.kind={section.kind!r} is no loss on states")
