"""The ranks of a learner on several nodes of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from deploy import ray_cluster
from deploy.prepare import prepare
from deploy.ray_learner import RayLearner
from deploy.readiness import wait_until_ready
from learner.learner import Learner
from system.adapters import Adapter
from tests import faults, nodes, tiny
from tests.test_remote_ranks import config, groups


@pytest.mark.chaos
def test_ranks_on_nodes_of_their_own_learn_like_one_and_leave_the_others_to_samplers(tmp_path: Path) -> None:
    """The nodes are of one machine, with one address: where ranks are put and how they meet is real, the way between is not."""
    cfg = config(tiny.folder(tmp_path), cpus=2)
    cfg = cfg.model_copy(update={"actors": cfg.actors.model_copy(update={"cpus": 4})})
    problem = prepare(cfg).problem
    alone = Learner.build(cfg, problem)
    with nodes.cluster(head_cpus=4) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        ray_cluster.connect(cfg.model_copy(update={"cluster": cfg.cluster.model_copy(update={"address": cluster.address})}))
        ranks = RayLearner(cfg, problem)
        wait_until_ready(ranks, samplers=0)
        homes = ray.get([actor.node.remote() for actor in ranks.actors])
        assert [home.split()[-1] for home in homes] == ranks.nodes
        others = {node["NodeID"] for node in ray.nodes()} - set(ranks.nodes)
        assert len(set(ranks.nodes)) == 2 and [ray_cluster.nodes()[other].cpus for other in others] == [4]
        sampler: Any = ray.remote(faults.FaultySampler)
        beside = sampler.options(num_cpus=1, **ray_cluster.off(ranks.nodes)).remote(cfg, faults.Faults())
        assert ray.get(beside.node.remote()) in others
        for step in range(3):
            batch = groups(problem, step)
            alone.update(batch)
            ranks.update(batch).result(timeout=60)
        one, two = alone.adapter(1), ray.get(ranks.adapter(1))
        assert isinstance(two, Adapter)
        for name, expected in one.tensors().items():
            np.testing.assert_allclose(two.tensors()[name], expected, atol=1e-5)
