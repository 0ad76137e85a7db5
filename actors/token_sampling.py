"""Samples drawn token by token, and the best of several, or several by their weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from actors.decoder import Decoder, Draws, Tokens
from system.posterior import log_mean_exp
from system.trajectory import Prompt


def sample_sequences(
    decoder: Decoder, prompt: Prompt, samples: int, proposal: Callable[[Tensor], Tensor] = lambda log_q_BC: log_q_BC
) -> tuple[list[Tokens], np.ndarray]:
    """Left to right, each token from `proposal` of the policy's log-probs. Rows that stop are dropped from the batch."""
    rows = decoder.policy.start(prompt.policy_tokens)
    rows.select(np.zeros(samples, np.int64))
    drawn: list[list[int]] = [[] for _ in range(samples)]
    log_q_K, live_B = np.zeros(samples), np.arange(samples)
    while len(live_B):
        column_B, log_q_B = decoder.columns(proposal(rows.log_q_BC))
        log_q_K[live_B] += log_q_B
        going = np.flatnonzero(column_B != decoder.constraints.stop_column)
        for k, column in zip(live_B[going], column_B[going], strict=True):
            drawn[k].append(int(decoder.constraints.columns[column]))
        live_B = live_B[going]
        rows.advance(going, column_B[going])
    return [tuple(tokens) for tokens in drawn], log_q_K


def ancestral(decoder: Decoder, prompt: Prompt, samples: int) -> Draws:
    return Draws(*sample_sequences(decoder, prompt, samples))


def tempered(decoder: Decoder, prompt: Prompt, samples: int) -> Draws:
    """Each token at a low temperature: not what whole sequences at a low temperature are."""
    temperature = decoder.settings.temperature
    return Draws(*sample_sequences(decoder, prompt, samples, lambda log_q_BC: (log_q_BC / temperature).log_softmax(-1)))


def nucleus(decoder: Decoder, prompt: Prompt, samples: int) -> Draws:
    """Without weights: what lies outside the nucleus is never drawn."""
    warper = TopPLogitsWarper(decoder.settings.top_p)
    unread = torch.empty(0, dtype=torch.long)
    tokens_K, _ = sample_sequences(decoder, prompt, samples, lambda log_q_BC: warper(unread, log_q_BC).log_softmax(-1))  # type: ignore[arg-type]
    return Draws(tokens_K)


def best_of_n(decoder: Decoder, prompt: Prompt, samples: int) -> Draws:
    """Each sample is the one with the highest reward of `oversample` draws of its own."""
    n = decoder.settings.oversample
    tokens_P, _ = sample_sequences(decoder, prompt, samples * n)
    best_K = decoder.log_target(prompt, tokens_P).reshape(samples, n).argmax(1)
    return Draws([tokens_P[k * n + best] for k, best in enumerate(best_K)])


def sir(decoder: Decoder, prompt: Prompt, samples: int) -> Draws:
    """Sampling importance resampling: K of n draws of the policy, with weights R^(1/T) / q."""
    tokens_P, log_q_P = sample_sequences(decoder, prompt, samples * decoder.settings.oversample)
    log_weight_P = decoder.log_target(prompt, tokens_P) - log_q_P
    chosen = decoder.resample(log_weight_P, samples)
    return Draws([tokens_P[n] for n in chosen], log_z=log_mean_exp(log_weight_P))
