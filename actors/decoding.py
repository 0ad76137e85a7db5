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

from collections.abc import Callable
from dataclasses import replace

from actors.beam_search import beam, diverse_beam
from actors.decoder import Decoder, Draws
from actors.smc import smc
from actors.token_sampling import ancestral, best_of_n, nucleus, sir, tempered
from system.trajectory import Prompt

METHODS: dict[str, Callable[[Decoder, Prompt, int], Draws]] = {
    "ancestral": ancestral,
    "tempered": tempered,
    "nucleus": nucleus,
    "beam": beam,
    "diverse_beam": diverse_beam,
    "best_of_n": best_of_n,
    "sir": sir,
    "smc": smc,
}


def draw(decoder: Decoder, method: str, prompt: Prompt, samples: int) -> Draws:
    """K samples by a method of METHODS. Raises KeyError for another."""
    before = decoder.policy.tokens_forwarded + decoder.reward.tokens_forwarded
    draws = METHODS[method](decoder, prompt, samples)
    after = decoder.policy.tokens_forwarded + decoder.reward.tokens_forwarded
    return replace(draws, model_tokens=after - before)
