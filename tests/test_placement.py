from __future__ import annotations

from typing import Any

import pytest

from deploy.placement import Node, Resources, check, idle_gpus, learner_homes, samplers_beside
from system.config import Config, ConfigError
from system.config_file import parse


def config(actors: dict[str, Any], learner: dict[str, Any]) -> Config:
    return parse({"task": {"kind": "random_number"}, "actors": actors, "learner": learner})


def nodes(*amounts: tuple[float, float]) -> list[Node]:
    return [Node.of(*each) for each in amounts]


def test_a_cluster_that_is_too_small_is_refused_with_what_is_asked_and_what_there_is() -> None:
    cfg = config({"count": 3, "cpus": 2, "gpus": 0.5}, {"cpus": 1, "gpus": 1})
    check(cfg, nodes((7, 2.5)))
    with pytest.raises(ConfigError, match=r"actors.count=3: learner.cpus=1 and 3 x actors.cpus=2 need 7 cpus.* has 6; lower"):
        check(cfg, nodes((6, 2.5)))
    with pytest.raises(ConfigError, match=r"learner.gpus=1 and 3 x actors.gpus=0.5 need 2.5 gpus.* has 0; lower one"):
        check(cfg, nodes((7, 0)))


def test_gpus_that_nothing_reserves_are_named() -> None:
    unused = idle_gpus(config({}, {"gpus": 1}), nodes((8, 2), (8, 2)))
    assert [warning[:42] for warning in unused] == ["actors.gpus=0, but the nodes have 4 GPUs: "]
    assert len(idle_gpus(config({}, {}), nodes((8, 1)))) == 2
    assert idle_gpus(config({}, {}), nodes((8, 0))) == []
    assert idle_gpus(config({"gpus": 0.5}, {"gpus": 0.5}), nodes((8, 1))) == []


def test_fractions_of_a_gpu_fill_it() -> None:
    check(config({"count": 2, "gpus": 0.2}, {"gpus": 0.2}), nodes((10, 0.6)))  # 0.2 + 2 * 0.2 is 0.6 and a rounding error


def test_a_fraction_of_a_gpu_is_of_one() -> None:
    node = nodes((10, 2))
    with pytest.raises(ConfigError, match=r"fraction of a GPU is of one: .* each of 3 samplers 1 cpus and 0.6 gpus.* have: 10"):
        check(config({"count": 3, "gpus": 0.6}, {}), node)
    check(config({"count": 2, "gpus": 0.6}, {}), node)
    with pytest.raises(ConfigError, match=r"each of 2 samplers 1 cpus and 0.75 gpus"):
        check(config({"count": 2, "gpus": 0.75}, {"gpus": 0.5}), node)
    check(config({"count": 3, "gpus": 0.5}, {"gpus": 0.5}), node)


def test_a_share_is_taken_from_the_gpu_that_it_fits_most_closely() -> None:
    free = Node(4, (1.0, 0.25, 0.5))
    assert free.without(Resources(1, 0.5)) == Node(3, (0.25, 0.0, 1.0))
    assert free.without(Resources(0, 1)) == Node(4, (0.25, 0.5, 0.0))
    assert (free.copies(Resources(0, 0.5)), free.copies(Resources(0, 1)), free.copies(Resources(2, 0.25))) == (3, 1, 2)
    assert Node.of(4, 2.5).copies(Resources(0, 1)) == 2


def test_an_actor_that_no_single_node_can_hold_is_refused_though_the_sums_would_do() -> None:
    with pytest.raises(ConfigError, match=r"each of 1 samplers 3 cpus.*the nodes have: 2 cpus; 2 cpus"):
        check(config({"cpus": 3}, {"cpus": 1}), nodes((2, 0), (2, 0)))
    with pytest.raises(ConfigError, match="the learner 3 cpus"):
        check(config({"cpus": 1}, {"cpus": 3}), nodes((2, 0), (2, 0)))


def test_the_fewest_samplers_count_and_not_the_most() -> None:
    cfg = config({"min": 1, "max": 8}, {})
    check(cfg, nodes((2, 0)))
    with pytest.raises(ConfigError, match=r"actors.min=1"):
        check(cfg, nodes((1, 0)))


def test_the_learner_goes_where_it_takes_the_least_room_from_samplers() -> None:
    cfg = config({"cpus": 4, "gpus": 1}, {"cpus": 2})
    uneven = nodes((8, 2), (2, 0), (4, 1))
    assert learner_homes(cfg, uneven) == [1]
    assert samplers_beside(cfg, uneven, [1]) == 3
    assert samplers_beside(cfg, uneven, [0]) == 2
    assert learner_homes(config({}, {"gpus": 1}), nodes((8, 0), (8, 0))) == []


def test_each_rank_of_the_learner_goes_where_it_leaves_room_for_the_samplers() -> None:
    cfg = config({"count": 1, "cpus": 4}, {"ranks": 2, "groups_per_update": 2, "cpus": 2})
    assert sorted(learner_homes(cfg, nodes((4, 0), (2, 0), (2, 0)))) == [1, 2]
    assert learner_homes(cfg, nodes((4, 0), (4, 0))) == [0, 0]
    assert learner_homes(cfg, nodes((3, 0))) == [0], "the other waits for a node"


def test_each_rank_of_the_learner_counts_and_the_ranks_may_be_on_several_nodes() -> None:
    learner = {"ranks": 2, "groups_per_update": 2, "cpus": 2, "gpus": 1}
    cfg = config({"count": 1, "cpus": 1}, learner)
    check(cfg, nodes((5, 2)))
    check(cfg, nodes((3, 1), (2, 1)))
    with pytest.raises(ConfigError, match=r"2 x learner.cpus=2 and 1 x actors.cpus=1 need 5 cpus.* has 4; lower"):
        check(cfg, nodes((4, 2)))
    with pytest.raises(
        ConfigError, match=r"each of the learner's 2 ranks 2 cpus and 1 gpus.*the nodes have: 4 cpus and 1 gpus; 1"
    ):
        check(cfg, nodes((4, 1), (1, 1)))
