from __future__ import annotations

from typing import Any

import pytest

from deploy.placement import Resources, check, idle_gpus, learner_home, samplers_beside
from system.config import Config, ConfigError
from system.config_file import parse


def config(actors: dict[str, Any], learner: dict[str, Any]) -> Config:
    return parse({"task": {"kind": "random_number"}, "actors": actors, "learner": learner})


def nodes(*amounts: tuple[float, float]) -> list[Resources]:
    return [Resources(*each) for each in amounts]


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
    assert learner_home(cfg, uneven) == 1
    assert samplers_beside(cfg, uneven, 1) == 3
    assert samplers_beside(cfg, uneven, 0) == 2
    assert learner_home(config({}, {"gpus": 1}), nodes((8, 0), (8, 0))) is None


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
