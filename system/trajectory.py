"""The data that flows: what a sampler returns and a learner consumes. NumPy only: no torch, no vLLM, no Ray.

Suffixes name the axes everywhere: `_G` groups, `_K` samples of one prompt, `_T` tokens of one sample (ragged),
`_N` nodes of a prefix tree. Log-probabilities and log-rewards are natural logarithms, in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

Stop = Literal["sampled", "forced"]
"""How a trajectory ended: the policy drew the stop token, or reached the maximum length, where stopping is certain."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One inference problem: sample Z given `policy_tokens`, in proportion to a reward given `reward_tokens`."""

    id: str
    policy_tokens: tuple[int, ...]
    """What the policy sees before Z. Never empty: the first action needs a position to be predicted from."""
    reward_tokens: tuple[int, ...]
    """What the frozen model scores Z under. The same text in some tasks, another one in others."""
    evidence_tokens: tuple[int, ...] | None = None
    """Y, scored by the frozen model after `reward_tokens`, Z and the stop tokens; None where there is none."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What a task's own reward or evaluation needs, such as a known answer. JSON-serialisable."""
    hints: tuple[tuple[int, ...], ...] = ()
    """Pieces that good samples have, such as a constraint's keywords, as tokens: exploration may plant them."""

    def __post_init__(self) -> None:
        if not self.policy_tokens or not self.reward_tokens:
            raise ValueError(f"prompt {self.id!r}: policy_tokens and reward_tokens need at least one token each")


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How one trajectory was drawn: from (1 - epsilon) * softmax(logits / temperature) + epsilon * uniform(support)."""

    temperature: float = 1.0
    epsilon: float = 0.0
    planted: tuple[tuple[int, int], ...] = ()
    """(depth, token), by depth: the action at that depth is this one, unless the support has another for certain, and the stop
    is not drawn before the last of them."""

    @property
    def open_from(self) -> int:
        """The depth from which the stop may be drawn, whatever the minimum length is."""
        return self.planted[-1][0] + 1 if self.planted else 0


ON_POLICY = Behaviour()


@dataclass(frozen=True, slots=True)
class Request:
    """Work for a sampler: one trajectory of `prompt` for each behaviour."""

    group_id: int
    """Counts from 0 over the run. A request that is issued again keeps its id, so each group counts once."""
    prompt: Prompt
    behaviours_K: tuple[Behaviour, ...]
    seed: int
    """Of the engine's draws for this group."""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One sample Z. The stop token is not among `tokens`."""

    tokens_T: np.ndarray
    """int32 [T]."""
    is_action_T: np.ndarray
    """bool [T]. False where the environment wrote the token (a tool's output): context, and no part of log q."""
    logp_T: np.ndarray
    """float32 [T + 1], nats: what each token, and last the stop, was drawn with. 0 where not an action or forced.

    GFlowNet losses use the learner's own log q instead; the baselines' ratios are to this one."""
    stop: Stop
    behaviour: Behaviour = ON_POLICY

    def __post_init__(self) -> None:
        if not len(self.tokens_T) == len(self.is_action_T) == len(self.logp_T) - 1:
            raise ValueError(
                f"trajectory of {len(self.tokens_T)} tokens has {len(self.is_action_T)} is_action flags and "
                f"{len(self.logp_T)} log-probs; it needs {len(self.tokens_T)} and {len(self.tokens_T) + 1}"
            )

    def __len__(self) -> int:
        return len(self.tokens_T)

    @property
    def key(self) -> bytes:
        """Equal for equal token sequences."""
        return self.tokens_T.astype(np.int32).tobytes()


def sampled(
    tokens: Sequence[int] | np.ndarray, is_action: Sequence[bool] | np.ndarray | None = None, *, max_tokens: int | None = None
) -> Trajectory:
    """A trajectory as it would be recorded if the policy had drawn it; of actions alone, unless it is said which are.

    At `max_tokens` actions the stop is forced, which a loss over actions leaves out. Without, for what is only to be scored, it
    counts as drawn.
    """
    is_action_T = np.ones(len(tokens), bool) if is_action is None else np.array(is_action, bool)
    forced = max_tokens is not None and int(is_action_T.sum()) >= max_tokens
    logp_T = np.zeros(len(tokens) + 1, np.float32)
    return Trajectory(np.array(tokens, np.int32), is_action_T, logp_T, "forced" if forced else "sampled")


class Columns(NamedTuple):
    """Trajectories with their log-rewards end to end in a few arrays: how they travel between processes, and are saved. Samples
    are ragged, and a small array costs whoever sends or receives it as much as a large one.

    `_S` are the tokens of all K, `_P` all their prefixes, one more than tokens for each trajectory."""

    lengths_K: Sequence[int]
    """Tokens."""
    stops_K: Sequence[Stop]
    behaviours_K: Sequence[Behaviour]
    tokens_S: np.ndarray
    """int32."""
    is_action_S: np.ndarray
    """bool."""
    logp_P: np.ndarray
    """float32."""
    log_reward_P: np.ndarray
    """float64."""

    @classmethod
    def of(cls, trajectories_K: Sequence[Trajectory], log_reward_K: Sequence[np.ndarray]) -> Columns:
        return cls(
            [len(trajectory) for trajectory in trajectories_K],
            [trajectory.stop for trajectory in trajectories_K],
            [trajectory.behaviour for trajectory in trajectories_K],
            _end_to_end((trajectory.tokens_T for trajectory in trajectories_K), np.int32),
            _end_to_end((trajectory.is_action_T for trajectory in trajectories_K), np.bool_),
            _end_to_end((trajectory.logp_T for trajectory in trajectories_K), np.float32),
            _end_to_end(log_reward_K, np.float64),
        )

    def samples(self) -> Iterator[tuple[Trajectory, np.ndarray]]:
        """(trajectory, its log-rewards float64 [T + 1]), in order: views of these arrays."""
        ends = np.cumsum([0, *self.lengths_K]).tolist()
        for k, (begin, end) in enumerate(pairwise(ends)):
            tokens, prefixes = slice(begin, end), slice(begin + k, end + k + 1)
            yield (
                Trajectory(
                    self.tokens_S[tokens],
                    self.is_action_S[tokens],
                    self.logp_P[prefixes],
                    self.stops_K[k],
                    self.behaviours_K[k],
                ),
                self.log_reward_P[prefixes],
            )


def _end_to_end(arrays: Iterable[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype, casting="same_kind")


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """K samples of one prompt with the log-reward of stopping at every prefix."""

    prompt: Prompt
    trajectories_K: tuple[Trajectory, ...]
    log_reward_K: tuple[np.ndarray, ...]
    """K arrays float64 [T + 1]: entry t is the *untempered* log R, in nats, of stopping after t tokens; NaN inside a tool's
    output and where the reward has none (terminal rewards). Whether the policy may stop there is for the learner to know."""
    adapter_version: int
    """That it was begun with: unless samplers drain, later ones may have drawn the rest."""
    group_id: int
    faults: tuple[str, ...] = ()
    """Why samples that were drawn are not here: a line for each whose reward could not be had."""
    factors_K: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Where the reward is a product, by its name what each factor says of a sample where it ends, in the factor's own unit:
    float64 [K]. Empty where that is not known."""

    def __post_init__(self) -> None:
        if len(self.trajectories_K) != len(self.log_reward_K):
            raise ValueError(f"{len(self.trajectories_K)} trajectories but {len(self.log_reward_K)} log-rewards")
        for trajectory, log_reward_T in zip(self.trajectories_K, self.log_reward_K, strict=True):
            if len(log_reward_T) != len(trajectory) + 1:
                raise ValueError(
                    f"group {self.group_id}, prompt {self.prompt.id!r}: a trajectory of {len(trajectory)} tokens "
                    f"needs {len(trajectory) + 1} log-rewards, got {len(log_reward_T)}"
                )
        for name, value_K in self.factors_K.items():
            if len(value_K) != len(self.trajectories_K):
                raise ValueError(f"{len(self.trajectories_K)} trajectories but {len(value_K)} values of the factor {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        columns = Columns.of(self.trajectories_K, self.log_reward_K)
        return Group._of, (self.prompt, columns, self.adapter_version, self.group_id, self.faults, self.factors_K)

    @classmethod
    def _of(cls, prompt: Prompt, columns: Columns, *others: Any) -> Group:
        trajectories_K, log_reward_K = zip(*columns.samples(), strict=True) if columns.lengths_K else ((), ())
        return cls(prompt, trajectories_K, log_reward_K, *others)

    def __len__(self) -> int:
        return len(self.trajectories_K)

    @property
    def end_log_reward_K(self) -> np.ndarray:
        """float64 [K]: untempered log R of each whole sample, nats."""
        return np.array([log_reward_T[-1] for log_reward_T in self.log_reward_K], np.float64)

    @property
    def drawn(self) -> int:
        """Samples, those that are not here among them."""
        return len(self.trajectories_K) + len(self.faults)

    def factors_of(self, k: int) -> dict[str, float]:
        """What the factors of the reward say of a sample, as the columns of a table."""
        return {f"reward/{name}": float(value_K[k]) for name, value_K in self.factors_K.items()}

    @property
    def tokens(self) -> int:
        """Sampled tokens in the group."""
        return sum(len(trajectory) for trajectory in self.trajectories_K)


def merge_by_prompt(groups: Sequence[Group]) -> list[Group]:
    """The samples of each prompt as one group, so that they share a tree and a log Z.

    The oldest adapter version and the first group's id stand for all.
    """
    by_prompt: dict[str, list[Group]] = {}
    for group in groups:
        by_prompt.setdefault(group.prompt.id, []).append(group)
    return [
        replace(
            same[0],
            trajectories_K=tuple(trajectory for group in same for trajectory in group.trajectories_K),
            log_reward_K=tuple(log_reward_T for group in same for log_reward_T in group.log_reward_K),
            adapter_version=min(group.adapter_version for group in same),
            faults=tuple(fault for group in same for fault in group.faults),
            factors_K=joined([group.factors_K for group in same]),
        )
        for same in by_prompt.values()
    ]


def joined(factors_G: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The values of the samples of all groups in one array for each factor that all of them know."""
    names = [name for name in factors_G[0] if all(name in factors for factors in factors_G)]
    return {name: np.concatenate([factors[name] for factors in factors_G]) for name in names}
