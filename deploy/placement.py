"""Whether a run fits a cluster, and where its learner takes the least room from samplers. Knows numbers, not Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from system.config import Config, ConfigError

ROUNDING = 1e-6
"""Of sums of fractions of a GPU."""


class Resources(NamedTuple):
    """What an actor needs, of one GPU at most, or a node has in all."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} cpus" + (f" and {self.gpus:g} gpus" if self.gpus else "")


class Node(NamedTuple):
    """What a node has free: of each of its GPUs the share, since a fraction of a GPU is of one."""

    cpus: float
    gpus: tuple[float, ...]

    @classmethod
    def of(cls, cpus: float, gpus: float) -> Node:
        """Where the free shares are known by their sum alone, they are of as few GPUs as may be."""
        rest = gpus % 1
        return cls(cpus, (1.0,) * int(gpus) + ((rest,) if rest > ROUNDING else ()))

    @property
    def all(self) -> Resources:
        return Resources(self.cpus, sum(self.gpus))

    def copies(self, each: Resources) -> int:
        """How many times `each` fits; a very large number where it needs nothing."""
        fitting = []
        if each.cpus > 0:
            fitting.append(_times(self.cpus, each.cpus))
        if each.gpus > 0:
            fitting.append(sum(_times(share, each.gpus) for share in self.gpus))
        return min(fitting, default=1 << 30)

    def without(self, each: Resources) -> Node:
        """With `each` placed, which fits: a share of a GPU on the one that it fits most closely."""
        shares = sorted(self.gpus)
        if each.gpus > 0:
            at = next(at for at, share in enumerate(shares) if share > each.gpus - ROUNDING)
            shares[at] -= each.gpus
        return Node(self.cpus - each.cpus, tuple(shares))


def _times(have: float, need: float) -> int:
    return int((have + ROUNDING) // need)


def check(config: Config, nodes: Sequence[Node], samplers: int | None = None) -> None:
    """Raises ConfigError if the learner and `samplers` (by default the fewest that the run starts with) do not fit these nodes,
    even if nothing else ran there."""
    learner, sampler = rank_needs(config), sampler_needs(config)
    fewest = config.actors.fewest if samplers is None else samplers
    field = f"actors.{'count' if config.actors.min is None else 'min'}={config.actors.fewest}"
    for kind in Resources._fields:
        own, each = getattr(learner, kind), getattr(sampler, kind)
        needed, have = config.learner.ranks * own + fewest * each, sum(getattr(node.all, kind) for node in nodes)
        if needed > have + ROUNDING:
            times = f"{config.learner.ranks} x " if config.learner.ranks > 1 else ""
            raise ConfigError(
                f"{field}: {times}learner.{kind}={own:g} and {fewest} x actors.{kind}={each:g} need {needed:g} {kind}, but the "
                f"cluster has {have:g}; lower one of these, or set cluster.wait_seconds where nodes are to join"
            )
    homes = learner_homes(config, nodes)
    if len(homes) < config.learner.ranks or samplers_beside(config, nodes, homes) < fewest:
        shown = "; ".join(str(node.all) for node in nodes[:8])
        shown += f"; and {len(nodes) - 8} more" if len(nodes) > 8 else ""
        ranks = "the learner" if config.learner.ranks == 1 else f"each of the learner's {config.learner.ranks} ranks"
        raise ConfigError(
            f"{field}: an actor needs a node that holds all of it, a fraction of a GPU is of one: {ranks} {learner}, "
            f"each of {fewest} samplers {sampler}, and the nodes have: {shown}; lower what each needs, or set "
            "cluster.wait_seconds where nodes are to join"
        )


def idle_gpus(config: Config, nodes: Sequence[Node]) -> list[str]:
    """What is hardly meant on nodes with GPUs: that nothing reserves one of them."""
    have = sum(node.all.gpus for node in nodes)
    unused = [field for field in ("learner", "actors") if not getattr(config, field).gpus]
    return [
        f"{field}.gpus=0, but the nodes have {have:g} GPUs: none is reserved for it, so that it shares one with others or has "
        f"none; set {field}.gpus=1, or a fraction that several share"
        for field in unused if have
    ]  # fmt: skip


def learner_homes(config: Config, nodes: Sequence[Node]) -> list[int]:
    """For each rank of the learner the index of the node where it costs the fewest samplers, one after the other; fewer than
    there are ranks where the next one fits no node."""
    homes: list[int] = []
    for _ in range(config.learner.ranks):
        left = beside_learner(config, nodes, homes)
        fitting = [index for index, node in enumerate(left) if node.copies(rank_needs(config))]
        if not fitting:
            break
        homes.append(max(fitting, key=lambda index: samplers_beside(config, nodes, [*homes, index])))
    return homes


def beside_learner(config: Config, nodes: Sequence[Node], homes: Sequence[int]) -> list[Node]:
    """What is left of these nodes with a rank of the learner on each of `homes`."""
    left = list(nodes)
    for home in homes:
        left[home] = left[home].without(rank_needs(config))
    return left


def samplers_beside(config: Config, nodes: Sequence[Node], homes: Sequence[int]) -> int:
    """How many samplers these nodes hold, with a rank of the learner on each of `homes`."""
    return sum(node.copies(sampler_needs(config)) for node in beside_learner(config, nodes, homes))


def rank_needs(config: Config) -> Resources:
    return Resources(config.learner.cpus, config.learner.gpus)


def sampler_needs(config: Config) -> Resources:
    return Resources(config.actors.cpus, config.actors.gpus)
