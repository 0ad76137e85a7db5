"""Diagnostics against closed forms: posteriors small enough to list, and samples that are q itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.posterior import Bounds, Exact, log_mean_exp, mean_metrics

LOG_REWARD_O = {"first": np.log([1.0, 2.0, 3.0, 4.0]), "second": np.log([1.0, 2.0, 3.0, 4.0][::-1]) + 7.0}
"""Two prompts, the second with e^7 times the Z of the first."""


def log_z(log_reward_O: np.ndarray) -> float:
    return float(np.logaddexp.reduce(log_reward_O))


def drawn_exactly(log_reward_O: np.ndarray, count_O: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(u [K], q [O]) of K samples in which each outcome occurs as often as q = count / K says."""
    q_O = count_O / count_O.sum()
    return np.repeat(log_reward_O - np.log(q_O), count_O), q_O


# ----------------------------------------------------------------------------------------------------------- Exact


@pytest.mark.parametrize("prompt", list(LOG_REWARD_O))
def test_the_posterior_itself_is_at_no_distance_whatever_its_z(prompt: str) -> None:
    log_target_O = LOG_REWARD_O[prompt] - log_z(LOG_REWARD_O[prompt])
    exact = Exact.of(log_target_O, log_target_O)
    assert exact.kl_target_q == pytest.approx(0.0, abs=1e-12)
    assert exact.kl_q_target == pytest.approx(0.0, abs=1e-12)
    assert exact.total_variation == pytest.approx(0.0, abs=1e-12)
    assert (exact.listed_mass, exact.worst_ratio) == pytest.approx((1.0, 1.0))


def test_two_outcomes_by_hand() -> None:
    exact = Exact.of(np.log([0.9, 0.1]), np.log([0.5, 0.5]))
    assert exact.kl_target_q == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
    assert exact.kl_q_target == pytest.approx(0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5))
    assert exact.total_variation == pytest.approx(0.4)
    assert exact.worst_ratio == pytest.approx(0.2)


def test_a_missing_mode_is_seen() -> None:
    """KL(q || target) hardly moves when a tenth is lost: what names the loss is the other direction and the ratio."""
    target = np.full(10, 0.1)
    lost = np.append(np.full(9, (1 - 1e-9) / 9), 1e-9)
    exact = Exact.of(np.log(lost), np.log(target))
    assert exact.kl_target_q > 1.7
    assert exact.kl_q_target < 0.11
    assert exact.worst_ratio == pytest.approx(1e-8)
    assert exact.total_variation == pytest.approx(0.1)


def test_a_mode_without_any_mass_is_infinitely_far() -> None:
    with np.errstate(divide="ignore"):
        log_q_O = np.log([0.5, 0.5, 0.0])
    exact = Exact.of(log_q_O, np.log(np.full(3, 1 / 3)))
    assert exact.kl_target_q == np.inf
    assert exact.kl_q_target == pytest.approx(np.log(1.5))
    assert exact.worst_ratio == 0.0


def test_mass_elsewhere_counts() -> None:
    """Half of q on outcomes that are not listed: half the mass has to move, and the reverse KL pays for it."""
    exact = Exact.of(np.log([0.25, 0.25]), np.log([0.5, 0.5]))
    assert exact.listed_mass == pytest.approx(0.5)
    assert exact.total_variation == pytest.approx(0.5)
    assert exact.kl_target_q == pytest.approx(np.log(2))
    assert exact.kl_q_target == pytest.approx(0.5 * np.log(0.5) + 0.5 * np.log(0.5 / 1e-6))


@given(st.lists(st.integers(1, 50), min_size=2, max_size=8), st.lists(st.integers(1, 50), min_size=8, max_size=8))
def test_distances_are_distances(weights: list[int], others: list[int]) -> None:
    q, target = np.array(weights) / sum(weights), np.array(others[: len(weights)]) / sum(others[: len(weights)])
    exact = Exact.of(np.log(q), np.log(target))
    assert exact.kl_target_q >= -1e-12
    assert exact.kl_q_target >= -1e-9
    assert exact.total_variation**2 <= exact.kl_target_q / 2 + 1e-12  # Pinsker
    assert 0 < exact.worst_ratio <= 1 + 1e-12


def test_exact_metrics_have_their_prefix() -> None:
    metrics = Exact.of(np.log([0.5, 0.5]), np.log([0.5, 0.5])).metrics()
    assert set(metrics) == {f"exact/{name}" for name in Exact.__dataclass_fields__}


# ---------------------------------------------------------------------------------------------------------- Bounds


@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=6),
    st.lists(st.integers(1, 9), min_size=6, max_size=6),
    st.floats(-50, 50),
)
def test_bounds_are_their_closed_forms_when_the_samples_are_q(rewards: list[float], counts: list[int], shift: float) -> None:
    log_reward_O, count_O = np.array(rewards) + shift, np.array(counts[: len(rewards)])
    u_K, q_O = drawn_exactly(log_reward_O, count_O)
    bounds, z = Bounds.of(u_K), log_z(log_reward_O)
    posterior_O = np.exp(log_reward_O - z)
    assert bounds.log_z_lower == pytest.approx(z - float((q_O * (np.log(q_O) - (log_reward_O - z))).sum()), abs=1e-6)
    assert bounds.log_z_lower <= z + 1e-9
    assert bounds.log_z_weighted == pytest.approx(z, abs=1e-6)
    assert bounds.ess == pytest.approx(1.0 / float((posterior_O**2 / q_O).sum()), rel=1e-6)
    assert bounds.spread == pytest.approx(float(np.var(u_K, ddof=1)), abs=1e-9)
    assert 0 < bounds.ess <= 1 + 1e-12


@pytest.mark.parametrize("prompt", list(LOG_REWARD_O))
def test_at_the_posterior_every_bound_is_log_z_and_every_sample_counts(prompt: str) -> None:
    u_K, _ = drawn_exactly(LOG_REWARD_O[prompt], np.exp(LOG_REWARD_O[prompt] - LOG_REWARD_O[prompt].min()).round().astype(int))
    bounds, z = Bounds.of(u_K), log_z(LOG_REWARD_O[prompt])
    assert (bounds.log_z_lower, bounds.log_z_weighted) == pytest.approx((z, z))
    assert bounds.spread == pytest.approx(0.0, abs=1e-12)
    assert bounds.ess == pytest.approx(1.0)


def test_draws_without_a_reward_have_no_weight_and_leave_the_bounds_bounds() -> None:
    """Of six outcomes two have no reward: the posterior is over the others."""
    count_O = np.array([3, 1, 4, 2])
    q_O = count_O / 16  # the other six draws fell on what has no reward
    for log_reward_O in LOG_REWARD_O.values():
        z = log_z(log_reward_O)
        bounds = Bounds.of(np.repeat(log_reward_O - np.log(q_O), count_O), drawn=16)
        among_O = count_O / count_O.sum()
        assert bounds.log_z_lower == pytest.approx(z - float((among_O * (np.log(among_O) - log_reward_O + z)).sum()))
        assert bounds.log_z_lower < z
        assert bounds.log_z_weighted == pytest.approx(z)
        assert bounds.ess == pytest.approx(1.0 / float((np.exp(log_reward_O - z) ** 2 / q_O).sum()))
    assert Bounds.of(np.zeros(2), drawn=4).log_z_lower == pytest.approx(-np.log(2))


def test_ess_is_1_only_without_spread() -> None:
    assert Bounds.of(np.full(5, 3.0)).ess == 1.0
    assert Bounds.of(np.full(5, 3.0)).spread == 0.0
    slightly = Bounds.of(np.array([3.0, 3.0, 3.0, 3.0, 3.1]))
    assert slightly.ess < 1.0
    assert slightly.spread > 0.0
    assert Bounds.of(np.array([0.0, 0.0, 0.0, 800.0])).ess == pytest.approx(0.25)  # one of four counts


def test_the_weighted_estimate_converges_where_the_lower_bound_stays_below() -> None:
    rng, log_reward_O, q_O = np.random.default_rng(0), LOG_REWARD_O["second"], np.array([0.1, 0.2, 0.3, 0.4])
    z = log_z(log_reward_O)
    errors = []
    for k in (10, 1_000, 100_000):
        runs = [Bounds.of((log_reward_O - np.log(q_O))[rng.choice(4, size=k, p=q_O)]) for _ in range(20)]
        errors.append(float(np.mean([abs(run.log_z_weighted - z) for run in runs])))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01
    kl = float((q_O * (np.log(q_O) - log_reward_O + z)).sum())
    assert np.mean([run.log_z_lower for run in runs]) == pytest.approx(z - kl, abs=0.01)
    assert kl > 0.3


def test_far_off_rewards_neither_overflow_nor_vanish() -> None:
    assert log_mean_exp(np.array([-2000.0, -2000.0])) == pytest.approx(-2000.0)
    assert log_mean_exp(np.array([2000.0, 0.0])) == pytest.approx(2000.0 - np.log(2))


@pytest.mark.parametrize("k", [0, 1])
def test_fewer_than_two_samples_give_no_bounds(k: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 samples, got {k}"):
        Bounds.of(np.zeros(k))


def test_means_over_prompts_are_named_for_the_tracker() -> None:
    metrics = mean_metrics([Bounds.of(np.array([1.0, 1.0])), Bounds.of(np.array([2.0, 4.0]))])
    assert set(metrics) == {f"posterior/{name}" for name in ("log_z_lower", "log_z_weighted", "spread", "ess")}
    assert metrics["posterior/log_z_lower"] == pytest.approx(2.0)
    assert metrics["posterior/spread"] == pytest.approx(1.0)
