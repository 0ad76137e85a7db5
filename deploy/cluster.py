"""Connecting to Ray: the cluster that the job was submitted to, a named one, or a new local one on loopback."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import ray

from system.config import Config

ROOT = Path(__file__).resolve().parents[1]


def connect(config: Config) -> None:
    """Raises ConfigError if the learner and the samplers do not fit the cluster."""
    # Ray would send usage statistics otherwise, and override CUDA_VISIBLE_DEVICES of actors without GPUs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    common = {"log_to_driver": True, "logging_level": logging.WARNING}
    if address:
        ray.init(address=address, **common)
    else:
        wanted = config.learner.ranks * config.learner.cpus + config.actors.count * config.actors.cpus
        cpus = config.cluster.local_cpus or max(os.cpu_count() or 1, int(wanted + 0.999))
        ray.init(
            address="local",  # without it Ray would join whatever cluster was started on this machine last
            num_cpus=cpus,
            include_dashboard=config.cluster.dashboard,
            dashboard_host="127.0.0.1",
            # Workers import the project, and reward functions of the user's, wherever they are started.
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])}},
            **common,
        )
    resources = ray.cluster_resources()
    config.check_resources(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def disconnect() -> None:
    """Ends this driver's actors, and the cluster if it is a local one."""
    if ray.is_initialized():
        ray.shutdown()
