"""Connecting to Ray: the cluster that the job was submitted to, a named one, or a new local one on loopback."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# A call after the end of a run must not start a cluster of its own. Ray reads this when it is imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import ray
from ray._private import ray_constants
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError

from deploy import placement
from deploy.placement import Node, Resources
from system.config import Config, ConfigError

logger = logging.getLogger("headwater")

ROOT = Path(__file__).resolve().parents[1]
NODE_ID = "ray.io/node-id"
"""The label that Ray gives every node."""
_SECRET = re.compile(r"(?i)(passw(or)?d|pass|token|secret|credential|key)s?(_?\d+)?$")
"""Names of environment variables whose values are nobody's business."""
REACH_SECONDS = 10.0
"""For a named cluster to take a connection."""


def connect(config: Config) -> None:
    """Raises ConfigError if the cluster cannot be joined, or the learner and the samplers do not fit it and
    cluster.wait_seconds is 0."""
    # Ray would send usage statistics otherwise, and override CUDA_VISIBLE_DEVICES of actors without GPUs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    field = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
    if address and address.startswith("ray://"):
        raise ConfigError(
            f"{field}={address!r}: the driver runs on the cluster, not beside it: submit it there by `ray job submit`, or give "
            "the HOST:PORT that `ray start --head` printed"
        )
    common: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if not os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        # Workers import the project, and reward functions of the user's, from anywhere; a submitted job brings both.
        common["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])}}
    on_terminate = signal.getsignal(signal.SIGTERM)
    if address:
        try:
            # Ray itself would ask for minutes.
            if direct := re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", address):
                socket.create_connection((direct[1], int(direct[2])), timeout=REACH_SECONDS).close()
            ray.init(address=address, **common)
        except (OSError, OverflowError, ValueError, RuntimeError, RayError) as error:
            raise ConfigError(
                f"{field}={address!r}: Ray cannot join it ({error}); "
                "give the HOST:PORT that `ray start --head` printed, or leave it out for a Ray of this machine's own"
            ) from error
    else:
        wanted = config.learner.ranks * config.learner.cpus + config.actors.most * config.actors.cpus
        cpus = config.cluster.local_cpus or max(os.cpu_count() or 1, int(wanted + 0.999))
        with _loopback_alone(), _deaf_to_hangups():
            ray.init(
                address="local",  # without it Ray would join whatever cluster was started on this machine last
                num_cpus=cpus,
                include_dashboard=config.cluster.dashboard,
                dashboard_host="127.0.0.1",
                **common,
            )
    # Ray puts in a handler that ends the process at once; the stop of a submitted job is to leave a checkpoint.
    signal.signal(signal.SIGTERM, on_terminate)
    check(config, waited=0.0)
    for warning in placement.idle_gpus(config, list(nodes().values())):
        logger.warning(warning)
    if told := secrets(ray.get_runtime_context().runtime_env.get("env_vars") or {}):
        logger.warning(
            "%s came in the job's env_vars, which Ray writes into its logs: make it known on the nodes instead, as "
            "deploy/cluster/README.md says under Secrets",
            ", ".join(told),
        )


def secrets(names: Iterable[str]) -> list[str]:
    """Those that sound like one."""
    return sorted(name for name in names if _SECRET.search(name))


@contextlib.contextmanager
def _loopback_alone() -> Iterator[None]:
    """A Ray that is started inside listens on loopback, all of its processes, the actors among them: Ray does so on machines
    that can be no part of a cluster, and has no option for it."""
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _deaf_to_hangups() -> Iterator[None]:
    """A terminal that hangs up tells all processes of a command, Ray's among them, without which the driver could not end in
    order. What is ignored here stays so in processes that are started inside."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def disconnect() -> None:
    """Ends this driver's actors, and the cluster if it is a local one."""
    if ray.is_initialized():
        ray.shutdown()


def nodes() -> dict[str, Node]:
    """What each living node has in all, by its id."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return {node["NodeID"]: _node(node["Resources"]) for node in alive}


def _node(resources: Mapping[str, float]) -> Node:
    return Node.of(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def check(config: Config, waited: float, samplers: int | None = None) -> None:
    """Raises ConfigError if the learner and `samplers` (by default the fewest) do not fit the nodes, and the run has waited
    `waited` seconds for others to join, which is long enough."""
    if waited >= config.cluster.wait_seconds:
        placement.check(config, list(nodes().values()), samplers)


def learner_nodes(config: Config) -> list[str]:
    """For each rank of the learner the node where it takes the least room from samplers; fewer than there are ranks where no
    node can hold the next one."""
    present = nodes()
    return [list(present)[home] for home in placement.learner_homes(config, list(present.values()))]


def has_room(each: Resources, copies: int = 1) -> bool:
    """Nodes have `copies` times `each` free. Ray hears of what becomes free a moment later."""
    return sum(_node(free).copies(each) for free in available_resources_per_node().values()) >= copies


def could_have_room(each: Resources, copies: int) -> bool:
    """Nodes have `copies` times `each` in all."""
    return sum(node.copies(each) for node in nodes().values()) >= copies


def on(node: str) -> dict[str, Any]:
    """Options of an actor that is placed on `node`, or elsewhere if there is no room there."""
    return _preferring(node)


def off(avoided: Collection[str]) -> dict[str, Any]:
    """Options of an actor that is placed on another node than these, or on one of them if there is no room elsewhere."""
    return _preferring(f"!in({','.join(sorted(set(avoided)))})") if avoided else {}


def _preferring(selected: str) -> dict[str, Any]:
    if len(nodes()) < 2:
        return {}
    return {"label_selector": {NODE_ID: selected}, "fallback_strategy": [{"label_selector": {}}]}
