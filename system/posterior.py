"""How far the policy is from the posterior: exactly where outcomes can be listed, by bounds elsewhere. NumPy only.

All take log-weights or log-probabilities in nats. u = log R / T - log q, for whole trajectories drawn from q itself:
a small training loss is not evidence, since it speaks only of the states that were sampled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


def log_mean_exp(values: np.ndarray, drawn: int | None = None) -> float:
    """log of the mean of e^values over `drawn`, those among them that have no value counting as 0, without overflow."""
    return float(np.logaddexp.reduce(values) - np.log(drawn or len(values)))


def self_normalised(log_weight_K: np.ndarray) -> np.ndarray:
    """Importance weights that add up to 1, float64 [K], from log-weights in nats."""
    weights_K = np.exp(log_weight_K - np.max(log_weight_K))
    return weights_K / weights_K.sum()


def effective_share(log_weight_K: np.ndarray, drawn: int | None = None) -> float:
    """Effective sample size under these log-weights, nats, as a share of `drawn` samples, by default of K: then 1 iff all are
    the same."""
    weights_K = np.exp(log_weight_K - np.max(log_weight_K))
    return float(weights_K.sum() ** 2 / ((drawn or len(weights_K)) * np.square(weights_K).sum()))


@dataclass(frozen=True, slots=True)
class Exact:
    """q against a target whose outcomes are all listed."""

    kl_target_q: float
    """KL(target || q), nats: infinite if q misses an outcome, so it sees lost modes."""
    kl_q_target: float
    """KL(q || target) over the listed outcomes and one more for all the rest, which has the target mass 1e-6."""
    total_variation: float
    listed_mass: float
    """q's mass on the listed outcomes."""
    worst_ratio: float
    """Smallest q / target: below 1/2, some outcome has less than half its due."""

    @classmethod
    def of(cls, log_q_O: np.ndarray, log_target_O: np.ndarray) -> Exact:
        """`log_target_O` is normalised over the O outcomes; `log_q_O` need not be: q may put mass elsewhere."""
        q, target = np.exp(log_q_O), np.exp(log_target_O)
        elsewhere = max(0.0, 1.0 - float(q.sum()))
        difference = log_q_O - log_target_O
        reverse = float((q[q > 0] * difference[q > 0]).sum())
        if elsewhere > 0:
            reverse += elsewhere * (np.log(elsewhere) - np.log(1e-6))
        return cls(
            kl_target_q=float(-(target * difference).sum()),
            kl_q_target=reverse,
            total_variation=0.5 * (float(np.abs(q - target).sum()) + elsewhere),
            listed_mass=float(q.sum()),
            worst_ratio=float(np.exp(difference.min())),
        )

    def metrics(self) -> dict[str, float]:
        return {f"exact/{name}": value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Estimates from K samples of one prompt, drawn from q."""

    log_z_lower: float
    """Mean of u: E_q[u] <= log Z, with equality iff q is the posterior."""
    log_z_weighted: float
    """log of the mean of e^u: a tighter lower bound in expectation, equal to log Z as K grows."""
    spread: float
    """Variance of u, nats^2: 0 iff q is the posterior on what was sampled."""
    ess: float
    """Effective share of the samples under the weights e^u, in (0, 1]: 1 iff the spread is 0."""

    @classmethod
    def of(cls, u_K: np.ndarray, drawn: int | None = None) -> Bounds:
        """`drawn` counts those too that have no reward, and so no u: by default there are none.

        The others are draws from q(z | z has a reward) = q(z) / q(has a reward), so that their log-weights are u + log q(has
        a reward), which is estimated by their share.

        Raises ValueError for fewer than two samples: one says nothing about the spread.
        """
        if len(u_K) < 2:
            raise ValueError(f"bounds need at least 2 samples, got {len(u_K)}")
        return cls(
            log_z_lower=float(np.mean(u_K) + np.log(len(u_K) / (drawn or len(u_K)))),
            log_z_weighted=log_mean_exp(u_K, drawn),
            spread=float(np.var(u_K, ddof=1)),
            ess=effective_share(u_K, drawn),
        )


def mean_metrics(bounds_G: list[Bounds]) -> dict[str, float]:
    """Means over prompts, under the names that a tracker gets."""
    return {f"posterior/{name}": float(np.mean([getattr(b, name) for b in bounds_G])) for name in Bounds.__dataclass_fields__}
