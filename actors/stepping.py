"""A model stepped one token at a time over a batch of rows, with its keys and values kept: what decoding is written on.

vLLM is the engine of training and is faster; it gives samples, not the distributions that a search or a particle filter
chooses from. Here the model is a plain Hugging Face one, and the support is that of `system.constraints`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from system.constraints import Constraints


class NextTokens:
    """log q of what may come next, and the count of what it costs: `tokens_forwarded` through the model since the start."""

    def __init__(self, model: PreTrainedModel, constraints: Constraints) -> None:
        self.model = model
        self.constraints = constraints
        self.tokens_forwarded = 0
        self.device = next(model.parameters()).device
        self._columns = torch.from_numpy(constraints.columns).to(self.device)

    def start(self, prompt_tokens: Sequence[int]) -> Rows:
        """One row: the prompt, and nothing drawn."""
        return Rows(self, prompt_tokens)

    @torch.no_grad()
    def next_log_probs(
        self, tokens_BL: Tensor, cache: DynamicCache, drawn_B: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, Tensor]:
        """Reads L more tokens of each row into `cache`. Returns log q over the columns of the support, float32 [B, C], nats,
        and the log of what the model, over its whole vocabulary, gives to all that may come, float32 [B].

        `drawn_B` has the tokens of each row's sample, all equally many. At the maximum length nothing is read: the
        stop is certain.
        """
        constraints = self.constraints
        may_stop_B, certain_B = zip(*map(constraints.after, drawn_B), strict=True)
        if all(token == constraints.stop_token for token in certain_B):
            logits_BC = torch.zeros(len(tokens_BL), len(constraints.columns), device=self.device)
            whole_B = logits_BC[:, constraints.stop_column].clone()
        else:
            self.tokens_forwarded += tokens_BL.numel()
            output = self.model(input_ids=tokens_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits_BC = output.logits[:, -1, self._columns].float()
            whole_B = output.logits[:, -1].float().logsumexp(-1)
        logits_BC[~torch.tensor(may_stop_B, device=self.device), constraints.stop_column] = -torch.inf
        for row, token in enumerate(certain_B):
            if token is not None:
                column = int(constraints.column_of(np.array(token)))
                only = logits_BC[row, column].clone()
                logits_BC[row] = -torch.inf
                logits_BC[row, column] = only
        return logits_BC.log_softmax(-1), logits_BC.logsumexp(-1) - whole_B


def draw_columns(log_q_BC: Tensor, generator: torch.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A column for each row, int64 [B], and its log-prob, float64 [B]."""
    column_B1 = torch.multinomial(log_q_BC.exp(), 1, generator=generator)
    log_q_B = log_q_BC.gather(1, column_B1)[:, 0]
    return column_B1[:, 0].cpu().numpy(), log_q_B.double().cpu().numpy()


class Rows:
    """B unfinished sequences of one prompt, all equally long. `log_q_BC`, float32 nats, is for their next token, and
    `log_mass_B` what the model itself gives to all tokens that this may be."""

    def __init__(self, policy: NextTokens, prompt_tokens: Sequence[int]) -> None:
        self._policy = policy
        self._cache = DynamicCache(config=policy.model.config)
        self._drawn_B: list[tuple[int, ...]] = [()]
        prompt_BL = torch.tensor([list(prompt_tokens)], device=policy.device)
        self.log_q_BC, self.log_mass_B = policy.next_log_probs(prompt_BL, self._cache, self._drawn_B)

    def select(self, parent_B: np.ndarray) -> None:
        """Row b becomes what row parent_B[b] was: rows are dropped, repeated and reordered."""
        if np.array_equal(parent_B, np.arange(len(self.log_q_BC))):
            return
        parents = torch.from_numpy(parent_B).to(self._policy.device)
        self._cache.batch_select_indices(parents)
        self.log_q_BC, self.log_mass_B = self.log_q_BC[parents], self.log_mass_B[parents]
        self._drawn_B = [self._drawn_B[parent] for parent in parent_B]

    def fork(self, parent_B: np.ndarray) -> Rows:
        """What `select` makes of these rows, as others: these stay as they are."""
        rows = copy.copy(self)
        rows._cache = copy.deepcopy(self._cache)
        rows.select(parent_B)
        return rows

    def advance(self, parent_B: np.ndarray, column_B: np.ndarray) -> None:
        """Row b becomes row parent_B[b] with one token more, of column column_B[b] (int64 both). Without rows, nothing."""
        if len(parent_B) == 0:
            return
        self.select(parent_B)
        tokens_B = self._policy.constraints.columns[column_B]
        self._drawn_B = [(*drawn, int(token)) for drawn, token in zip(self._drawn_B, tokens_B, strict=True)]
        tokens_BL = torch.from_numpy(tokens_B)[:, None].to(self._policy.device)
        self.log_q_BC, self.log_mass_B = self._policy.next_log_probs(tokens_BL, self._cache, self._drawn_B)
