"""The ranks of a learner as real Ray actors: one handle, and what comes out is what one learner gives."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from deploy import ray_cluster
from deploy.placement import Resources
from deploy.prepare import prepare
from deploy.ray_learner import RayLearner
from deploy.readiness import wait_until_ready
from learner.learner import Learner
from system.adapters import Adapter
from system.config import Config, ConfigError
from system.config_file import parse
from system.handles import LearnerDied
from system.tasks.problem import Problem
from system.trajectory import Group, Prompt, sampled
from tests import faults, tiny
from tests.servers import listening


def config(folder: Path, **learner: object) -> Config:
    settings = {"steps": 12, "warmup_steps": 0, "ranks": 2, "groups_per_update": 2, "cpus": 0.5} | learner
    return parse(
        {
            "model": {"path": str(folder)},
            "lora": {"rank": 4},
            "task": {"kind": "random_number", "high": 20},
            "actors": {"cpus": 0},
            "learner": settings,
            "cluster": {"local_cpus": 6},
        }
    )


def groups(problem: Problem, seed: int) -> list[Group]:
    """Three groups of different sizes, digits as the task allows."""
    rng, result = np.random.default_rng(seed), []
    digits = [int(token) for token in problem.constraints.columns if token != problem.constraints.stop_token]
    for number in range(3):
        trajectories = [sampled(rng.choice(digits, rng.integers(1, 3)).tolist()) for _ in range(3 + 2 * number)]
        rewards = tuple(rng.normal(0.0, 1.0, len(t) + 1) for t in trajectories)
        prompt = Prompt(f"prompt-{number}", problem.prompts[0].policy_tokens[number:], (1,))
        result.append(Group(prompt, tuple(trajectories), rewards, 0, number))
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def problem(folder: Path) -> Iterator[Problem]:
    cfg = config(folder)
    ray_cluster.connect(cfg)
    yield prepare(cfg).problem
    ray_cluster.disconnect()


@pytest.mark.parametrize("shard_base", [False, True])
def test_two_ranks_behind_one_handle_learn_publish_score_and_resume_like_one(
    folder: Path, problem: Problem, shard_base: bool
) -> None:
    cfg = config(folder, shard_base=shard_base)
    alone, ranks = Learner.build(cfg, problem), RayLearner(cfg, problem)
    wait_until_ready(ranks)
    for seed in range(2):
        mine, own = ranks.update(groups(problem, seed)).result(timeout=60), alone.update(groups(problem, seed))
        assert mine["loss"] == pytest.approx(own["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-5)
    saved = ranks.save().result(timeout=60)
    published: Adapter = ray.get(ranks.adapter(7), timeout=60)  # type: ignore[assignment]
    published.verify(cfg.model.path)
    assert (published.version, published.step) == (7, 2)

    # A third update, then back: the two ranks go on from the file as the one does that never stopped.
    ranks.update(groups(problem, 9)).result(timeout=60)
    ranks.restore(saved, 2)
    mine, own = ranks.update(groups(problem, 2)).result(timeout=60), alone.update(groups(problem, 2))
    assert mine["loss"] == pytest.approx(own["loss"], rel=1e-5)
    scores = ranks.score(groups(problem, 3)).result(timeout=60)
    for score, expected in zip(scores, alone.score(groups(problem, 3)), strict=True):
        assert score.log_q_K == pytest.approx(expected.log_q_K, abs=1e-4)
    assert set(ranks.named()) == {"learner", "learner-1"}
    processes = [psutil.Process(pid) for pid in ray.get([actor.ready.remote() for actor in ranks.named().values()])]
    assert {address for address, _ in listening(processes)} == {"127.0.0.1"}  # of gloo's and Ray's

    broken = [Group(g.prompt, g.trajectories_K, tuple(r * 1e30 for r in g.log_reward_K), 0, 0) for g in groups(problem, 0)]
    with pytest.raises(FloatingPointError):
        ranks.update(broken).result(timeout=60)
    again, own = ranks.update(groups(problem, 4)).result(timeout=60), alone.update(groups(problem, 4))
    assert again["loss"] == pytest.approx(own["loss"], rel=1e-5)


@pytest.mark.chaos
def test_the_death_of_one_rank_is_an_error_at_once_and_ends_all(folder: Path, problem: Problem) -> None:
    ranks = RayLearner(config(folder, shard_base=True), problem)
    wait_until_ready(ranks)
    os.kill(ray.get(ranks.actors[1].ready.remote()), signal.SIGKILL)
    with pytest.raises(LearnerDied):
        ranks.update(groups(problem, 0)).result(timeout=60)
    with pytest.raises(RayActorError):
        ray.get(ranks.actors[0].ready.remote(), timeout=60)

    room: list[tuple[Resources, int]] = []

    @contextmanager
    def made(each: Resources, copies: int) -> Iterator[None]:
        room.append((each, copies))
        yield

    ranks.room = made
    ranks.restart()
    assert room == [(Resources(0.5, 0), 2)], "for each of the ranks"
    # Whatever call finds that one is gone, it is a death, and not an error of the others'.
    os.kill(ray.get(ranks.actors[1].ready.remote()), signal.SIGKILL)
    with pytest.raises(LearnerDied):
        ranks.adapter(1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_is_lost_before_it_is_built_is_a_loss_whatever_its_peers_say_of_it(
    folder: Path, problem: Problem, tmp_path: Path, ranks: int
) -> None:
    cfg = config(folder, ranks=ranks, groups_per_update=ranks).model_copy(update={"output_dir": str(tmp_path)})
    with pytest.raises(LearnerDied, match="the learner was lost before it was built"):
        wait_until_ready(RayLearner(cfg, faults.Faults(), actor=faults.LostRank))  # type: ignore[arg-type]


def test_ranks_that_cannot_be_built_give_their_own_error(folder: Path, problem: Problem, tmp_path: Path) -> None:
    cfg = config(folder).model_copy(update={"output_dir": str(tmp_path)})
    broken = faults.Faults(failed_builds=2)
    with pytest.raises(ConfigError, match="this actor cannot be built"):
        wait_until_ready(RayLearner(cfg, broken, actor=faults.IdleLearner))  # type: ignore[arg-type]
