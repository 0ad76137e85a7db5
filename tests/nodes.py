"""Ray nodes on this machine, which join and are killed as those of a real cluster are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from ray.cluster_utils import Cluster

from deploy import ray_cluster

ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    # By default Ray takes 15 s to notice that a node is gone; with these, two or three.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


@contextmanager
def cluster(head_cpus: int) -> Iterator[Cluster]:
    """A head; `add_node` and `remove_node` of what this gives do the rest. A node dies with the thread that added it, and Ray
    lets none but the main one."""
    with mock.patch.dict(os.environ, ENVIRONMENT):
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "include_dashboard": False})
        try:
            yield started
        finally:
            ray_cluster.disconnect()
            started.shutdown()
