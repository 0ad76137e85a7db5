"""The replay buffer: per prompt, distinct trajectories with their untempered rewards.

GFlowNet losses need no importance weights for replayed samples, and the learner divides log R by the temperature of the
day, so what is stored stays true while the temperature anneals. A rare mode that was sampled once is not lost again.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from system import learner_config
from system.trajectory import Behaviour, Columns, Group, Trajectory


class Entry(NamedTuple):
    trajectory: Trajectory
    log_reward_T: np.ndarray
    at_end: float
    """log R where it ends."""


class Replay:
    def __init__(self, config: learner_config.Replay) -> None:
        self.config = config
        self._prompts: dict[str, dict[bytes, Entry]] = {}

    @property
    def _draws(self) -> bool:
        """Some share is drawn from the buffer."""
        return bool(self.config.prioritised or self.config.uniform)

    def __len__(self) -> int:
        """Trajectories in the buffer."""
        return sum(len(entries) for entries in self._prompts.values())

    def add(self, group: Group) -> None:
        """Keeps each distinct trajectory once, with its newest reward. At capacity the lowest log R at the end goes. Where
        no share is drawn from the buffer it stays empty, and checkpoints small."""
        if not self._draws:
            return
        entries = self._prompts.setdefault(group.prompt.id, {})
        for trajectory, log_reward_T in zip(group.trajectories_K, group.log_reward_K, strict=True):
            if math.isfinite(at_end := float(log_reward_T[-1])):
                key = trajectory.key
                entries.pop(key, None)
                entries[key] = Entry(_owned(trajectory), log_reward_T.copy(), at_end)
        if (excess := len(entries) - self.config.capacity) > 0:
            keys, at_ends = list(entries), [entry.at_end for entry in entries.values()]
            # Of equal rewards the oldest goes: a stable sort keeps the order of what ties.
            for index in np.argsort(at_ends, kind="stable")[:excess]:
                del entries[keys[index]]

    def mix(self, fresh: Group, rng: np.random.Generator) -> Group:
        """`fresh` with replayed trajectories of its prompt, in the configured shares; those it has itself are not drawn.

        With fewer in the buffer than the shares ask for, all that differ from the fresh ones are taken. A share that is
        no whole number of trajectories is rounded up or down at random, so that it is right on average.
        """
        have = {trajectory.key for trajectory in fresh.trajectories_K}
        stored = [entry for key, entry in self._prompts.get(fresh.prompt.id, {}).items() if key not in have]
        per_share = len(fresh) / self.config.fresh
        wanted = [int(per_share * share + rng.random()) for share in (self.config.prioritised, self.config.uniform)]
        if not stored or not any(wanted):
            return fresh
        log_reward = np.array([entry.at_end for entry in stored]) / self.config.prioritised_temperature
        chosen: list[int] = []
        # The Gumbel top-k draws without replacement in proportion to exp(score).
        for count, scores in zip(wanted, (log_reward, np.zeros(len(stored))), strict=True):
            keys = scores + rng.gumbel(size=len(stored))
            keys[chosen] = -np.inf
            chosen += np.argsort(-keys)[: min(count, len(stored) - len(chosen))].tolist()
        return Group(
            fresh.prompt,
            fresh.trajectories_K + tuple(stored[index].trajectory for index in chosen),
            fresh.log_reward_K + tuple(stored[index].log_reward_T for index in chosen),
            fresh.adapter_version,
            fresh.group_id,
        )

    # ---------------------------------------------------------------------------------------------- checkpointing

    def save(self) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """(arrays, records): ragged arrays end to end, and a JSON-serialisable record for each trajectory."""
        kept = [(prompt_id, entry) for prompt_id, entries in self._prompts.items() for entry in entries.values()]
        records = [
            {"prompt": prompt_id, "length": len(trajectory), "stop": trajectory.stop, **asdict(trajectory.behaviour)}
            for prompt_id, (trajectory, _, _) in kept
        ]
        columns = Columns.of([entry.trajectory for _, entry in kept], [entry.log_reward_T for _, entry in kept])
        arrays = {
            "tokens": columns.tokens_S,
            "is_action": columns.is_action_S,
            "logp": columns.logp_P,
            "log_reward": columns.log_reward_P,
        }
        return arrays, records

    def restore(self, arrays: dict[str, np.ndarray], records: list[dict[str, Any]]) -> None:
        self._prompts = {}
        if not self._draws:
            return
        columns = Columns(
            [record["length"] for record in records],
            [record["stop"] for record in records],
            [
                Behaviour(
                    record["temperature"],
                    record["epsilon"],
                    tuple((depth, token) for depth, token in record.get("planted", ())),
                )
                for record in records
            ],
            arrays["tokens"],
            arrays["is_action"],
            arrays["logp"],
            arrays["log_reward"],
        )
        for record, (trajectory, log_reward_T) in zip(records, columns.samples(), strict=True):
            entry = Entry(_owned(trajectory), log_reward_T.copy(), float(log_reward_T[-1]))
            self._prompts.setdefault(record["prompt"], {})[trajectory.key] = entry


def _owned(trajectory: Trajectory) -> Trajectory:
    """With arrays of its own: those that come from another process, or a checkpoint, are views of all that came, which would
    stay too."""
    tokens_T, is_action_T, logp_T = (each.copy() for each in (trajectory.tokens_T, trajectory.is_action_T, trajectory.logp_T))
    return Trajectory(tokens_T, is_action_T, logp_T, trajectory.stop, trajectory.behaviour)
