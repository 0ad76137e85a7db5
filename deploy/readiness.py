"""Waiting until the actors of a run are placed and built, or it is known that they never will be."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from deploy import ray_cluster
from deploy.answers import GRACE_SECONDS
from deploy.ray_errors import first_line, is_loss, raised
from system.config import Config, ConfigError
from system.handles import LearnerDied
from system.run_error import RunError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the cluster while actors are not placed."""
TELL_SECONDS = 60.0
"""Between two warnings that some still wait: for their turn on a cluster that others use, say."""


class Handle(Protocol):
    """Actors that may still be starting."""

    config: Config
    replaces: bool
    """An actor that is lost gets a successor, to which `ready` then refers."""

    def complete(self) -> bool:
        """All actors are started: none has yet to be replaced."""
        ...

    def ready(self) -> list[Any]:
        """A reference for each, which resolves once it is built."""
        ...


def wait_until_ready(*handles: Handle, samplers: int | None = None) -> None:
    """Waits until every actor is built.

    Raises:
        ConfigError: the learner and `samplers` (by default the fewest) fit no nodes, or were not placed and built in time;
            the message has what was asked for and what there is.
        RunError: actors were lost over it more than actors.max_deaths times, those that are lost together counting once.
        LearnerDied: the learner, which has no successor, was lost.
        Exception: what building an actor's part raised.
    """
    config, began, lost, waves = handles[0].config, time.monotonic(), set(), 0
    tell_after, patient = TELL_SECONDS, False
    while True:
        owners = {reference: handle for handle in handles for reference in handle.ready()}
        done, missing = ray.wait(list(owners), num_returns=len(owners), timeout=LOOK_SECONDS)
        errors = {reference: error for reference in done if (error := _error(reference)) is not None}
        losses = {reference: error for reference, error in errors.items() if is_loss(error)}
        for reference, loss in losses.items():
            if not owners[reference].replaces:
                raise LearnerDied(
                    f"the learner was lost before it was built: {first_line(loss)}; where its memory is too small, "
                    "learner.dtype=bfloat16 takes half, and learner.shard_base=true shares the layers over learner.ranks"
                ) from loss
            missing.append(reference)
        for reference in (reference for reference in errors if reference not in losses):
            owner = owners[reference]
            peers = [] if owner.replaces or patient else [other for other in missing if owners[other] is owner]
            if not peers:
                raise raised(errors[reference])
            # What one rank raises may be the loss of another, which shows a moment later.
            ray.wait(peers, num_returns=len(peers), timeout=GRACE_SECONDS)
            patient = True
            break
        waves += not lost.issuperset(losses)
        lost.update(losses)
        if waves > config.actors.max_deaths:
            cause = list(losses.values())[-1]
            raise RunError(
                f"actors were lost before they were built {waves} times (actors.max_deaths={config.actors.max_deaths}); "
                f"the last cause: {first_line(cause)}"
            ) from cause
        if not missing and all(handle.complete() for handle in handles):
            return
        waited = time.monotonic() - began
        ray_cluster.check(config, waited, samplers)
        if missing and waited > config.actors.start_seconds:
            raise ConfigError(
                f"{len(missing)} of {len(owners)} actors were not placed and built within actors.start_seconds="
                f"{config.actors.start_seconds:g}; {_there()}"
            )
        if missing and waited > tell_after:
            logger.warning(
                "%d of %d actors are not placed and built after %.0f s; %s", len(missing), len(owners), waited, _there()
            )
            tell_after += TELL_SECONDS
        if lost.issuperset(missing):
            time.sleep(LOOK_SECONDS)  # until their successors are started


def _error(built: Any) -> RayError | None:
    """How an actor was lost, or what building its part raised; None if it is built."""
    try:
        ray.get(built)
    except RayError as error:
        return error
    return None


def _there() -> str:
    return f"the cluster has {_shown(ray.cluster_resources())}, of which {_shown(ray.available_resources())} is free"


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
