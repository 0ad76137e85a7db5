"""What is reported of a step, apart from what the learner says of its update. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from system.loop_state import Counters
from system.step_clock import StepSeconds
from system.trajectory import Group, joined


def of_groups(fresh: Sequence[Group], staleness: Sequence[int]) -> dict[str, float]:
    """Of the fresh groups of an update, and how many updates behind the version of each was."""
    trajectories = [trajectory for group in fresh for trajectory in group.trajectories_K]
    lengths = [len(trajectory) for trajectory in trajectories]
    log_reward = np.concatenate([group.end_log_reward_K for group in fresh])
    return {
        "staleness": float(np.mean(staleness)),
        "length/mean": float(np.mean(lengths)),
        "length/max": float(np.max(lengths)),
        "forced_stops": float(np.mean([trajectory.stop == "forced" for trajectory in trajectories])),
        "log_reward/mean": float(np.mean(log_reward)),
        "log_reward/max": float(np.max(log_reward)),
        **{f"reward/{name}": float(value_K.mean()) for name, value_K in joined([g.factors_K for g in fresh]).items()},
    }


def of_counters(counters: Counters) -> dict[str, float]:
    """What went wrong so far, and was tolerated."""
    return {
        "groups/too_stale": float(counters.too_stale),
        "groups/given_up": float(counters.given_up),
        "groups/reissued": float(counters.reissued),
        "reward_faults": float(counters.reward_faults),
        "samplers/deaths": float(counters.deaths),
        "learner/deaths": float(counters.learner_deaths),
    }


def of_seconds(seconds: StepSeconds, fresh: Sequence[Group]) -> dict[str, float]:
    """How fast it went."""
    return {
        "seconds/step": seconds.whole,
        "seconds/wait": seconds.wait,
        "seconds/settle": seconds.settle,
        "idle/learner": seconds.idle / seconds.whole,
        "rate/trajectories_per_second": sum(map(len, fresh)) / seconds.whole,
        "rate/sampled_tokens_per_second": sum(group.tokens for group in fresh) / seconds.whole,
    }
