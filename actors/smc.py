"""Sequential Monte Carlo."""

from __future__ import annotations

import numpy as np

from actors.decoder import Decoder, Draws, Tokens
from system.posterior import log_mean_exp
from system.trajectory import Prompt, sampled


def smc(decoder: Decoder, prompt: Prompt, samples: int) -> Draws:
    """Sequential Monte Carlo: n particles from the policy, resampled when they weigh less than n / 2 of them would.

    A step multiplies a particle's weight by target(now) / target(before) / q(token), and the target of a sequence that has
    stopped is R^(1/T), whatever the intermediate ones were: so weights are proper for R^(1/T), and their mean estimates Z. Of
    the base model's tokens those that may not be drawn cost a particle what they would have had, at once.
    """
    count = samples * decoder.settings.oversample
    constraints = decoder.constraints
    rows = decoder.policy.start(prompt.policy_tokens)
    rows.select(np.zeros(count, np.int64))
    tokens_P: list[Tokens] = [()] * count
    live_P = np.ones(count, bool)
    log_p_P, log_target_P, log_weight_P, log_z = np.zeros(count), np.zeros(count), np.zeros(count), 0.0
    row_P, column_P = np.zeros(count, np.int64), np.zeros(count, np.int64)
    while live_P.any():
        at_B = np.flatnonzero(live_P)
        row_P[at_B] = np.arange(len(at_B))
        column_P[at_B], log_q_B = decoder.columns(rows.log_q_BC)
        log_p_P[at_B] += log_q_B + rows.log_mass_B.double().cpu().numpy()
        live_P[at_B] = column_P[at_B] != constraints.stop_column
        for n in np.flatnonzero(live_P):
            tokens_P[n] = (*tokens_P[n], int(constraints.columns[column_P[n]]))
        log_target_B = _targets(decoder, prompt, [tokens_P[n] for n in at_B], log_p_P[at_B], ~live_P[at_B])
        log_weight_P[at_B] += log_target_B - log_target_P[at_B] - log_q_B
        log_target_P[at_B] = log_target_B
        weight_P = np.exp(log_weight_P - log_weight_P.max())
        if weight_P.sum() ** 2 < np.square(weight_P).sum() * count / 2:
            log_z += log_mean_exp(log_weight_P)
            chosen = decoder.resample(log_weight_P, count)
            log_weight_P = np.zeros(count)
            tokens_P = [tokens_P[n] for n in chosen]
            live_P, log_p_P, log_target_P = live_P[chosen], log_p_P[chosen], log_target_P[chosen]
            row_P, column_P = row_P[chosen], column_P[chosen]
        rows.advance(row_P[live_P], column_P[live_P])
    log_z += log_mean_exp(log_weight_P)
    return Draws([tokens_P[n] for n in decoder.resample(log_weight_P, samples)], log_z=log_z)


def _targets(
    decoder: Decoder, prompt: Prompt, tokens_B: list[Tokens], log_p_B: np.ndarray, stopped_B: np.ndarray
) -> np.ndarray:
    """log of the target of each particle, float64 [B], nats: log R / T where it stopped.

    Of a prefix p(prefix)^(1/T), times what `prefix_reward` says of it; or, with the twist "reward", R^(1/T) of it. One that
    could not be a sample, or has no reward, may become one that has: it counts as no worse than the others of its likelihood.
    """
    result_B, ended, going = log_p_B / decoder.reward_temperature, np.flatnonzero(stopped_B), np.flatnonzero(~stopped_B)
    result_B[ended] = decoder.log_target(prompt, [tokens_B[b] for b in ended])
    whole = decoder.settings.twist == "reward"
    reward = decoder.reward if whole else decoder.prefix_reward
    known = [b for b in going if decoder.constraints.can_stop(tokens_B[b], len(tokens_B[b]))]
    if reward is None or not known:
        return result_B
    scores = reward.score(prompt, [sampled(list(tokens_B[b])) for b in known])
    gain_B = np.full(len(tokens_B), np.nan)
    for k in scores.kept:
        b, log_reward = known[k], scores.log_reward_K[k][-1] / decoder.reward_temperature
        gain_B[b] = log_reward - result_B[b] if whole else log_reward
    if not np.isnan(gain_B).all():
        result_B[going] += np.where(np.isnan(gain_B), np.nanmean(gain_B), gain_B)[going]
    return result_B
