"""What to sample next, as a pure function of the group's number.

Prompts come in epochs, each a permutation of all of them; behaviours and seeds follow from the number too. So a request
that is issued again is the same one, and a checkpoint needs to know numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from system.sampler_config import Exploration
from system.trajectory import ON_POLICY, Behaviour, Prompt, Request


class Requests:
    """What the training asks for, group after group."""

    def __init__(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, exploration: Exploration, seed: int, max_tokens: int
    ) -> None:
        """`max_tokens` is the most actions of a sample: hints are planted within them."""
        if not prompts:
            raise ValueError("there must be at least one prompt")
        self.prompts = tuple(prompts)
        self.samples_per_prompt = samples_per_prompt
        self.exploration = exploration
        self.seed = seed
        self.max_tokens = max_tokens
        self._shuffled: tuple[int, np.ndarray] | None = None
        """The epoch at hand and its order: of many prompts that takes longer than all else here."""

    def training(self, group_id: int) -> Request:
        """The request of group `group_id`, from 0."""
        epoch, index = divmod(group_id, len(self.prompts))
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.prompts))
        rng = np.random.default_rng((self.seed, 2, group_id))
        prompt = self.prompts[self._shuffled[1][index]]
        behaviours = explore(self.exploration.at(group_id), self.samples_per_prompt, prompt.hints, self.max_tokens, rng)
        return Request(group_id, prompt, behaviours, int(rng.integers(2**31)))


def evaluation_request(
    prompt: Prompt, index: int, samples: int, *, seed: int, round_: int, behaviour: Behaviour = ON_POLICY
) -> Request:
    """Samples of the prompt that is number `index` of an evaluation; each round has draws of its own. The request's id is
    negative: it is no group of the training."""
    rng = np.random.default_rng((seed, 3, round_, index))
    return Request(-1 - index, prompt, (behaviour,) * samples, int(rng.integers(2**31)))


def explore(
    exploration: Exploration, samples: int, hints: Sequence[Sequence[int]], max_tokens: int, rng: np.random.Generator
) -> tuple[Behaviour, ...]:
    """Behaviours of a group: the on-policy share exactly, the others each with a temperature of their own.

    Into the last of them, `exploration.planted` of the exploring ones, the hints are planted: a target that the policy hardly
    ever meets gives it nothing to learn from, and the losses take samples from anywhere.
    """
    on_policy, planted = exploration.counts(samples)
    temperatures = rng.uniform(*exploration.temperature, size=samples - on_policy)
    exploring = [Behaviour(float(temperature), exploration.epsilon) for temperature in temperatures]
    for index in range(len(exploring) - planted, len(exploring)):
        exploring[index] = replace(exploring[index], planted=places(hints, max_tokens, rng))
    return (ON_POLICY,) * on_policy + tuple(exploring)


def places(hints: Sequence[Sequence[int]], max_tokens: int, rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    """(depth, token) by depth: every hint whole, at a place of its own, in any order; nothing where they do not fit."""
    room = max_tokens - sum(map(len, hints))
    if room < 0:
        return ()
    gaps = np.sort(rng.integers(0, room + 1, len(hints)))
    order = rng.permutation(len(hints))
    tokens = [(int(gap), token) for gap, number in zip(gaps, order, strict=True) for token in hints[number]]
    return tuple((gap + done, token) for done, (gap, token) in enumerate(tokens))
