"""Beam search and diverse beam search over the support."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest

import numpy as np
import torch

from actors.decoder import Decoder, Draws, Tokens
from system.trajectory import Prompt


def beam(decoder: Decoder, prompt: Prompt, samples: int) -> Draws:
    """The K most likely sequences that a beam of K finds, by log q and most likely first."""
    return Draws(_beams(decoder, prompt, [samples]))


def diverse_beam(decoder: Decoder, prompt: Prompt, samples: int) -> Draws:
    """K groups of one beam with a Hamming penalty (Vijayakumar et al. 2016, arXiv:1610.02424)."""
    return Draws(_beams(decoder, prompt, [1] * samples))


def _beams(decoder: Decoder, prompt: Prompt, width_G: Sequence[int]) -> list[Tokens]:
    """Each of G groups of beams keeps its `width` best, after a penalty for tokens that groups before it take at the same
    place.

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
