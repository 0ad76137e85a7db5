"""Whether a run fits a cluster, and where its learner takes the least room from samplers. Knows numbers, not Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from system.config import Config, ConfigError

ROUNDING = 1e-6
"""Of sums of fractions of a GPU."""


class Resources(NamedTuple):
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} cpus" + (f" and {self.gpus:g} gpus" if self.gpus else "")


def check(config: Config, nodes_N: Sequence[Resources], samplers: int | None = None) -> None:
    """Raises ConfigError if the learner and `samplers` (by default the fewest that the run starts with) do not fit these nodes,
    even if nothing else ran there."""
    learner, sampler = _learner(config), _sampler(config)
    fewest = config.actors.fewest if samplers is None else samplers
    field = f"actors.{'count' if config.actors.min is None else 'min'}={config.actors.fewest}"
    for kind in Resources._fields:
        own, each = getattr(learner, kind), getattr(sampler, kind)
        needed, have = config.learner.ranks * own + fewest * each, sum(getattr(node, kind) for node in nodes_N)
        if needed > have + ROUNDING:
            times = f"{config.learner.ranks} x " if config.learner.ranks > 1 else ""
            raise ConfigError(
                f"{field}: {times}learner.{kind}={own:g} and {fewest} x actors.{kind}={each:g} need {needed:g} {kind}, but the "
                f"cluster has {have:g}; lower one of these, or set cluster.wait_seconds where nodes are to join"
            )
    left_N = beside_learner(config, nodes_N)
    if left_N is None or sum(copies(node, sampler) for node in left_N) < fewest:
        shown = "; ".join(map(str, nodes_N[:8])) + (f"; and {len(nodes_N) - 8} more" if len(nodes_N) > 8 else "")
        ranks = "the learner" if config.learner.ranks == 1 else f"each of the learner's {config.learner.ranks} ranks"
        raise ConfigError(
            f"{field}: an actor needs a node that holds all of it: {ranks} {learner}, each of {fewest} samplers {sampler}, "
            f"and the nodes have: {shown}; lower what each needs, or set cluster.wait_seconds where nodes are to join"
        )


def idle_gpus(config: Config, nodes_N: Sequence[Resources]) -> list[str]:
    """What is hardly meant on nodes with GPUs: that nothing reserves one of them."""
    have = sum(node.gpus for node in nodes_N)
    unused = [field for field in ("learner", "actors") if not getattr(config, field).gpus]
    return [
        f"{field}.gpus=0, but the nodes have {have:g} GPUs: none is reserved for it, so that it shares one with others or has "
        f"none; set {field}.gpus=1, or a fraction that several share"
        for field in unused if have
    ]  # fmt: skip


def beside_learner(config: Config, nodes_N: Sequence[Resources]) -> list[Resources] | None:
    """What is left of the nodes with all ranks of the learner placed, one after the other; None where one fits no node."""
    left_N = list(nodes_N)
    for _ in range(config.learner.ranks):
        home = learner_home(config, left_N)
        if home is None:
            return None
        left_N[home] = _without_rank(config, left_N[home])
    return left_N


def learner_home(config: Config, nodes_N: Sequence[Resources]) -> int | None:
    """Index of the node where a rank of the learner costs the fewest samplers; None where it fits no node."""
    fitting = [index for index, node in enumerate(nodes_N) if copies(node, _learner(config))]
    return max(fitting, key=lambda index: samplers_beside(config, nodes_N, index), default=None)


def samplers_beside(config: Config, nodes_N: Sequence[Resources], home: int) -> int:
    """How many samplers these nodes hold, with a rank of the learner on node `home`."""
    left_N = list(nodes_N)
    left_N[home] = _without_rank(config, nodes_N[home])
    return sum(copies(node, _sampler(config)) for node in left_N)


def _without_rank(config: Config, node: Resources) -> Resources:
    return Resources(node.cpus - config.learner.cpus, node.gpus - config.learner.gpus)


def _learner(config: Config) -> Resources:
    return Resources(config.learner.cpus, config.learner.gpus)


def _sampler(config: Config) -> Resources:
    return Resources(config.actors.cpus, config.actors.gpus)


def copies(node: Resources, each: Resources) -> int:
    """How many times `each` fits `node`; a very large number where it needs nothing."""
    return min([int((have + ROUNDING) // need) for have, need in zip(node, each, strict=True) if need > 0], default=1 << 30)
