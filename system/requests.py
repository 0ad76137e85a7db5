"""What to sample next, as a pure function of the group's number.

Prompts come in epochs, each a permutation of all of them; behaviours and seeds follow from the number too. So a request
that is issued again is the same one, and a checkpoint needs to know numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from system.config import Exploration
from system.trajectory import Behaviour, Prompt, Request


class Requests:
    def __init__(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, exploration: Exploration, seed: int, max_tokens: int = 0
    ) -> None:
        """`max_tokens` is the most actions of a sample: hints are planted within them."""
        if not prompts:
            raise ValueError("there must be at least one prompt")
        self.prompts = tuple(prompts)
        self.samples_per_prompt = samples_per_prompt
        self.exploration = exploration
        self.seed = seed
        self.max_tokens = max_tokens

    def of(self, prompts: Sequence[Prompt]) -> Requests:
        """The same for other prompts."""
        return Requests(prompts, self.samples_per_prompt, self.exploration, self.seed, self.max_tokens)

    def training(self, group_id: int) -> Request:
        """The request of group `group_id`, from 0."""
        epoch, index = divmod(group_id, len(self.prompts))
        order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.prompts))
        rng = np.random.default_rng((self.seed, 2, group_id))
        prompt = self.prompts[order[index]]
        behaviours = explore(self.exploration, self.samples_per_prompt, rng)
        behaviours = plant(behaviours, self.exploration.planted, prompt.hints, self.max_tokens, rng)
        return Request(group_id, prompt, behaviours, int(rng.integers(2**31)))

    def evaluation(self, index: int, samples: int, round_: int) -> Request:
        """On-policy samples of prompt `index`. Its id is negative: it is no group of the training."""
        rng = np.random.default_rng((self.seed, 3, round_, index))
        return Request(-1 - index, self.prompts[index], (Behaviour(),) * samples, int(rng.integers(2**31)))


def explore(exploration: Exploration, samples: int, rng: np.random.Generator) -> tuple[Behaviour, ...]:
    """Behaviours of a group: the on-policy share exactly, the others each with a temperature of their own."""
    on_policy = round(exploration.on_policy * samples)
    temperatures = rng.uniform(*exploration.temperature, size=samples - on_policy)
    exploring = tuple(Behaviour(float(temperature), exploration.epsilon) for temperature in temperatures)
    return (Behaviour(),) * on_policy + exploring


def plant(
    behaviours_K: tuple[Behaviour, ...], share: float, hints: Sequence[Sequence[int]], max_tokens: int, rng: np.random.Generator
) -> tuple[Behaviour, ...]:
    """The last of the exploring behaviours, `share` of them, with every hint at a place of its own, in any order.

    A target that the policy almost never meets gives exploration nothing to learn from; the losses take samples from anywhere.
    """
    exploring = sum(not behaviour.on_policy for behaviour in behaviours_K)
    room = max_tokens - sum(map(len, hints))
    count = round(share * exploring) if hints and room >= 0 else 0

    def places() -> tuple[tuple[int, int], ...]:
        gaps = np.sort(rng.integers(0, room + 1, len(hints)))
        tokens = [
            (int(gap), token) for gap, number in zip(gaps, rng.permutation(len(hints)), strict=True) for token in hints[number]
        ]
        return tuple((gap + done, token) for done, (gap, token) in enumerate(tokens))

    kept = len(behaviours_K) - count
    return behaviours_K[:kept] + tuple(replace(behaviour, planted=places()) for behaviour in behaviours_K[kept:])
