"""Samplers and searches that need no training, over the same support and the same reward as the trained policy.

What a GFlowNet amortises can be had at inference for more compute: these are what it must be compared with, at equal cost.
Each method takes K samples of one prompt and counts `model_tokens`, all tokens that a model, policy or reward, has read for
them. Scoring the result afterwards costs every method the same and is not counted.

Transformers' `generate` could draw and search a beam, but it reads the prompt once for each row and goes on with rows that
have stopped, so costs would not compare; its diverse beam search is code that is downloaded from a hub. genlm-control has
sequential Monte Carlo, and brings grammar and byte-level libraries, IPython and its own model wrapper for it; its support
and its stop would have to be made ours. Each of them is a few lines on `actors.stepping`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, TopPLogitsWarper

from actors.rewards import Reward
from actors.stepping import NextTokens, draw_columns
from system.constraints import Constraints
from system.posterior import log_mean_exp
from system.scores import Scores
from system.trajectory import Prompt, Trajectory, sampled

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]
NOTHING = -1e30
"""log R of a sample without a reward, nats: no weight beside any other, and finite, as weights are differences of it."""


@dataclass(frozen=True)
class Settings:
    temperature: float = 0.8
    """Of `tempered`: each token from softmax(logits / temperature)."""
    top_p: float = 0.95
    """Of `nucleus`: each token from the fewest that have this mass."""
    penalty: float = 1.0
    """Of `diverse_beam`: nats for each earlier group that takes the same token at the same place."""
    oversample: int = 4
    """Of `best_of_n`, `sir` and `smc`: sequences drawn for each one that is kept."""
    twist: Literal["likelihood", "reward"] = "likelihood"
    """Of `smc`: what the intermediate target of a prefix is. `likelihood`: p(prefix)^(1/T) of the base model, over its whole
    vocabulary, times the factors of R that are known at every prefix and ask no model. `reward`: R(stopping there)^(1/T),
    scored anew at every step."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Up to K samples of one prompt: a search gives fewer where the support has fewer."""

    tokens_K: list[Tokens]
    """Without the stop."""
    model_tokens: int
    """Tokens that policy and reward have read to get these."""
    log_q_K: np.ndarray | None = None
    """float64 [K], nats: what each was drawn with, independently and over the whole support; None if it was not so."""
    log_z: float | None = None
    """The method's own estimate of log Z, nats, Z being the sum of R^(1/T)."""

    def of(self, chosen: Sequence[int]) -> Draws:
        """Some of them, by their indices."""
        log_q_K = None if self.log_q_K is None else self.log_q_K[list(chosen)]
        return replace(self, tokens_K=[self.tokens_K[k] for k in chosen], log_q_K=log_q_K)

    def log_weights(self, log_target_K: np.ndarray) -> np.ndarray | None:
        """float64 [K], nats: weights whose mean estimates Z, given log R / T; None where the method has none.

        Samples that were resampled weigh the same.
        """
        if self.log_z is not None:
            return np.full(len(self.tokens_K), self.log_z)
        return None if self.log_q_K is None else log_target_K - self.log_q_K


class Decoder:
    """Draws from a Hugging Face model, base or adapted. `draw` is repeatable by `seed`."""

    def __init__(
        self,
        model: PreTrainedModel,
        constraints: Constraints,
        reward: Reward,
        reward_temperature: float = 1.0,
        settings: Settings = Settings(),  # noqa: B008  # frozen
        seed: int = 0,
        prefix_reward: Reward | None = None,
    ) -> None:
        """`prefix_reward` is what `smc` asks for at every prefix."""
        self.prefix_reward = prefix_reward
        self.policy = NextTokens(model, constraints)
        self.constraints = constraints
        self.reward = reward
        self.reward_temperature = reward_temperature
        self.settings = settings
        self.generator = torch.Generator(self.policy.device).manual_seed(seed)
        self.faults = 0
        """How often a sample had no reward."""

    def draw(self, method: str, prompt: Prompt, samples: int) -> Draws:
        """K samples by a method of METHODS. Raises KeyError for another."""
        before = self.policy.tokens_forwarded + self.reward.tokens_forwarded
        tokens_K, log_q_K, log_z = METHODS[method](self, prompt, samples)
        after = self.policy.tokens_forwarded + self.reward.tokens_forwarded
        return Draws(tokens_K, after - before, log_q_K, log_z)

    def scores(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        """As in training what has no reward is left out, and counted."""
        scores = self.reward.score(prompt, trajectories_K)
        if faults := scores.faults:
            self.faults += len(faults)
            logger.warning("%d samples of %s have no reward: %s", len(faults), prompt.id, next(iter(faults.values())))
        return scores

    def log_target(self, prompt: Prompt, tokens_K: Sequence[Tokens]) -> np.ndarray:
        """log R / T of whole sequences, float64 [K], nats; R of one without a reward is NOTHING."""
        if not tokens_K:
            return np.zeros(0)
        scores = self.scores(prompt, [sampled(list(tokens)) for tokens in tokens_K])
        log_reward_K = [NOTHING if k in scores.faults else scores.log_reward_K[k][-1] for k in range(len(tokens_K))]
        return np.array(log_reward_K) / self.reward_temperature

    def columns(self, log_q_BC: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """As `draw_columns`, by this decoder's seed."""
        return draw_columns(log_q_BC, self.generator)

    def resample(self, log_weight_P: np.ndarray, samples: int) -> np.ndarray:
        """Indices int64 [samples], systematic: each as often as its share of the weights, rounded up or down."""
        weights = np.exp(log_weight_P - log_weight_P.max())
        offset = torch.rand(1, generator=self.generator, device=self.policy.device).item()
        at = (np.arange(samples) + offset) / samples
        return np.minimum(np.searchsorted(np.cumsum(weights) / weights.sum(), at), len(weights) - 1)


Result = tuple[list[Tokens], np.ndarray | None, float | None]
"""Samples, what they were drawn with, and an estimate of log Z, as in `Draws`."""


def _sample(
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


def ancestral(decoder: Decoder, prompt: Prompt, samples: int) -> Result:
    return *_sample(decoder, prompt, samples), None


def tempered(decoder: Decoder, prompt: Prompt, samples: int) -> Result:
    """Each token at a low temperature: not what whole sequences at a low temperature are."""
    temperature = decoder.settings.temperature
    return *_sample(decoder, prompt, samples, lambda log_q_BC: (log_q_BC / temperature).log_softmax(-1)), None


def nucleus(decoder: Decoder, prompt: Prompt, samples: int) -> Result:
    """Without weights: what lies outside the nucleus is never drawn."""
    warper = TopPLogitsWarper(decoder.settings.top_p)
    unread = torch.empty(0, dtype=torch.long)
    tokens_K, _ = _sample(decoder, prompt, samples, lambda log_q_BC: warper(unread, log_q_BC).log_softmax(-1))  # type: ignore[arg-type]
    return tokens_K, None, None


def beam(decoder: Decoder, prompt: Prompt, samples: int) -> Result:
    """The K most likely sequences that a beam of K finds, by log q and most likely first."""
    return _beams(decoder, prompt, [samples]), None, None


def diverse_beam(decoder: Decoder, prompt: Prompt, samples: int) -> Result:
    """K groups of one beam with a Hamming penalty (Vijayakumar et al. 2016, arXiv:1610.02424)."""
    return _beams(decoder, prompt, [1] * samples), None, None


def _beams(decoder: Decoder, prompt: Prompt, width_G: Sequence[int]) -> list[Tokens]:
    """Each group keeps its `width` best, after a penalty for tokens that groups before it take at the same place.

    The penalty chooses what goes on; whole sequences are ranked by log q alone. Every prefix that is kept may stop.
    """
    constraints, penalty = decoder.constraints, decoder.settings.penalty
    rows = decoder.policy.start(prompt.policy_tokens)
    live_G: list[list[tuple[int, Tokens, float]]] = [[(0, (), 0.0)] for _ in width_G]  # row, tokens, log q
    ended_G: list[list[tuple[float, Tokens]]] = [[] for _ in width_G]
    while any(live_G):
        taken_C = torch.zeros(len(constraints.columns), device=decoder.policy.device, dtype=torch.float64)
        parents: list[int] = []
        columns: list[int] = []
        for g, width in enumerate(width_G):
            if not live_G[g]:
                continue
            row_B, tokens_B, log_q_B = zip(*live_G[g], strict=True)
            score_BC = rows.log_q_BC[list(row_B)].double() + taken_C.new_tensor(log_q_B)[:, None]
            stop_B = score_BC[:, constraints.stop_column].tolist()
            ended_G[g] += [end for end in zip(stop_B, tokens_B, strict=True) if end[0] > -np.inf]
            ended_G[g] = nlargest(width, ended_G[g])
            # log q only falls, so what is below a full list of ends can no more get into it.
            least = ended_G[g][-1][0] if len(ended_G[g]) == width else -np.inf
            score_BC[:, constraints.stop_column] = -torch.inf
            score_BC[score_BC <= least] = -torch.inf
            best = (score_BC - penalty * taken_C).flatten().topk(min(width, score_BC.numel()))
            live_G[g] = []
            for index in best.indices[best.values > -torch.inf].tolist():
                b, column = divmod(index, len(constraints.columns))
                live_G[g].append((len(parents), (*tokens_B[b], int(constraints.columns[column])), float(score_BC[b, column])))
                parents.append(row_B[b])
                columns.append(column)
                taken_C[column] += 1
        rows.advance(np.array(parents, np.int64), np.array(columns, np.int64))
    return [tokens for _, tokens in sorted((end for ended in ended_G for end in ended), reverse=True)]


def best_of_n(decoder: Decoder, prompt: Prompt, samples: int) -> Result:
    """Each sample is the one with the highest reward of `oversample` draws of its own."""
    n = decoder.settings.oversample
    tokens_P, _ = _sample(decoder, prompt, samples * n)
    best_K = decoder.log_target(prompt, tokens_P).reshape(samples, n).argmax(1)
    return [tokens_P[k * n + best] for k, best in enumerate(best_K)], None, None


def sir(decoder: Decoder, prompt: Prompt, samples: int) -> Result:
    """Sampling importance resampling: K of n draws of the policy, with weights R^(1/T) / q."""
    tokens_P, log_q_P = _sample(decoder, prompt, samples * decoder.settings.oversample)
    log_weight_P = decoder.log_target(prompt, tokens_P) - log_q_P
    chosen = decoder.resample(log_weight_P, samples)
    return [tokens_P[n] for n in chosen], None, log_mean_exp(log_weight_P)


def smc(decoder: Decoder, prompt: Prompt, samples: int) -> Result:
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
    return [tokens_P[n] for n in decoder.resample(log_weight_P, samples)], None, log_z


def _targets(
    decoder: Decoder, prompt: Prompt, tokens_B: list[Tokens], log_p_B: np.ndarray, stopped_B: np.ndarray
) -> np.ndarray:
    """log of the target of each particle, float64 [B], nats: log R / T where it stopped. Of a prefix p(prefix)^(1/T), times
    what `prefix_reward` says of it; or, with the twist "reward", R^(1/T) of it. A prefix that could not be a sample, or that
    has no reward, is only as likely as it is: the whole may have one."""
    result_B, ended = log_p_B / decoder.reward_temperature, np.flatnonzero(stopped_B)
    result_B[ended] = decoder.log_target(prompt, [tokens_B[b] for b in ended])
    whole = decoder.settings.twist == "reward"
    reward = decoder.reward if whole else decoder.prefix_reward
    known = [b for b in np.flatnonzero(~stopped_B) if decoder.constraints.can_stop(tokens_B[b], len(tokens_B[b]))]
    if reward is not None and known:
        scores = reward.score(prompt, [sampled(list(tokens_B[b])) for b in known])
        for k in scores.kept:
            likelihood = 0.0 if whole else result_B[known[k]]
            result_B[known[k]] = likelihood + scores.log_reward_K[k][-1] / decoder.reward_temperature
    return result_B


METHODS: dict[str, Callable[[Decoder, Prompt, int], Result]] = {
    "ancestral": ancestral,
    "tempered": tempered,
    "nucleus": nucleus,
    "beam": beam,
    "diverse_beam": diverse_beam,
    "best_of_n": best_of_n,
    "sir": sir,
    "smc": smc,
}
