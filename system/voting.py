"""Predictions by vote: each sample of a record says what it is, and what is said most often is the prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np


def wins(votes: Iterable[Hashable], truth: Hashable) -> bool:
    """The truth has more votes than any other answer: a tie is wrong, and so is no vote at all."""
    counts = Counter(votes)
    return counts.pop(truth, 0) > max(counts.values(), default=0)


def preferred(log_reward_EK: np.ndarray) -> np.ndarray:
    """int64 [K]: which of E evidences is the likeliest after each of K samples, the first of equals.

    log R of a sample holds log p(Z stop | X) with every evidence, so it cancels and log R compares log p(Y | X Z stop).
    """
    return log_reward_EK.argmax(axis=0)


def tally(votes_K: np.ndarray, truth: int, unscored: int = 0) -> dict[str, float]:
    """Of one record whose right answer is number `truth`: shares of 1. So many more were drawn and have no vote.

    `vote` is 1 where the truth has more votes than any other answer, so a tie is wrong; `accuracy` is its share
    of the votes, and `votes_agree` that of the answer with the most.
    """
    counts, drawn = np.bincount(votes_K, minlength=truth + 1), len(votes_K) + unscored
    return {
        "vote": float(wins([*votes_K.tolist(), *[None] * unscored], truth)),
        "accuracy": float(counts[truth] / drawn),
        "votes_agree": float(counts.max() / drawn),
    }
