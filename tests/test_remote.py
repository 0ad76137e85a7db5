"""Real Ray actors with real engines on a tiny model: the pool, the loop over it, and a sampler that is killed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import safetensors.numpy
from ray.exceptions import RayActorError

from deploy import ray_cluster
from deploy.allocator import KEEPS_MEMORY
from deploy.pool import RaySamplers
from deploy.prepare import prepare
from deploy.ray_actors import SamplerActor
from deploy.ray_learner import RayLearner
from deploy.readiness import wait_until_ready
from learner.replay import Replay
from system import evaluation
from system.config import Config
from system.config_file import parse
from system.handles import LearnerDied
from system.orchestrator import Orchestrator
from system.requests import Requests, evaluation_request
from system.run_error import RunError
from system.tasks.problem import Problem
from system.trajectory import Behaviour, Group, Request
from tests import faults, lora, tiny
from tests.fakes import FakeTracker
from tests.loops import requests_of


def config(folder: Path, **changes: object) -> Config:
    tree = {
        "model": {"path": str(folder)},
        "lora": {"rank": 4},
        "task": {"kind": "random_number", "high": 20},
        "sampler": {"samples_per_prompt": 8, "kv_cache_mb": 16},
        "actors": {"count": 2},
        "learner": {"steps": 12, "warmup_steps": 0, "publish_every": 1, "max_staleness": 2, "checkpoint_every": 100, "cpus": 1},
        "cluster": {"local_cpus": 4},
        "output_dir": str(folder),
    }
    return parse(tree | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Config]:
    cfg = config(folder)
    ray_cluster.connect(cfg)
    yield cfg
    ray_cluster.disconnect()


@pytest.fixture(scope="module")
def problem(folder: Path, running: Config) -> Problem:
    return prepare(running).problem


@pytest.fixture(scope="module")
def handles(running: Config, problem: Problem) -> Iterator[tuple[RayLearner, RaySamplers]]:
    learner, samplers = RayLearner(running, problem), RaySamplers(running, problem)
    wait_until_ready(learner, samplers)
    yield learner, samplers
    samplers.close()


def test_actors_begin_with_one_arena(handles: tuple[RayLearner, RaySamplers]) -> None:
    learner, samplers = handles
    for pid in ray.get([*samplers.ready(), learner.ready()[-1]]):
        assert b"MALLOC_ARENA_MAX=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_a_learner_on_cpus_keeps_its_memory_between_updates(handles: tuple[RayLearner, RaySamplers]) -> None:
    pid: int = ray.get(handles[0].ready()[-1])
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {f"{name}={value}".encode() for name, value in KEEPS_MEMORY.items()} <= set(environment)


def test_a_killed_learner_is_replaced_by_one_that_knows_as_much(
    folder: Path, problem: Problem, handles: tuple[RayLearner, RaySamplers], tmp_path: Path
) -> None:
    learner, samplers = handles
    cfg = config(folder, learner={"steps": 9, "warmup_steps": 0, "checkpoint_every": 4, "publish_every": 1})
    used: list[int] = []
    versions: list[int] = []
    saved: list[dict[str, np.ndarray]] = []

    def state(content: np.ndarray) -> dict[str, np.ndarray]:
        return safetensors.numpy.load(content.tobytes())

    def on_step(loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
        used.extend(group.group_id for group in fresh)
        versions.append(loop.counters.version)
        if loop.counters.step in (2, 6):  # before the first checkpoint, and after it
            before = state(learner.save().result())
            victim: int = ray.get(learner.actors[0].ready.remote())
            os.kill(victim, signal.SIGKILL)
            saved.append(state(loop.lasting.ask(lambda: learner.save().result())))
            np.testing.assert_equal(saved[-1], before)
            assert ray.get(learner.actors[0].ready.remote()) != victim

    requests = requests_of(cfg, problem.prompts)
    loop = Orchestrator(cfg, requests, samplers, learner, Replay(cfg.replay), FakeTracker(), tmp_path, on_step=on_step)
    loop.train()
    assert loop.counters.learner_deaths == len(saved) == 2
    faults.assert_each_counts_once(used, 9, loop)
    assert versions == sorted(set(versions))


def test_a_killed_sampler_is_replaced_and_every_group_counts_once(
    running: Config, problem: Problem, handles: tuple[RayLearner, RaySamplers], tmp_path: Path
) -> None:
    learner, samplers = handles
    victim: int = ray.get(samplers.ready()[0])
    used: list[int] = []

    def on_step(loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
        used.extend(group.group_id for group in fresh)
        if loop.counters.step == 3:
            os.kill(victim, signal.SIGKILL)

    requests = requests_of(running, problem.prompts)
    tracker = FakeTracker()
    loop = Orchestrator(running, requests, samplers, learner, Replay(running.replay), tracker, tmp_path, on_step=on_step)
    loop.counters.version = 100  # above those that the samplers have seen
    loop.train()
    assert loop.counters.step == 12
    assert loop.counters.deaths == 1
    assert len(used) == len(set(used)) == 12
    # A slow sampler's group may come staler than the gate meant: it is counted, and used.
    assert sum(staleness > 2 for staleness in tracker.series("staleness")) == loop.counters.too_stale
    wait_until_ready(samplers)
    assert victim not in ray.get(samplers.ready())
    assert len(samplers.ready()) == 2


def test_a_learner_that_hangs_is_found_by_its_deadline_and_killed(folder: Path, running: Config) -> None:
    cfg = config(folder, learner={"answer_seconds": 1, "cpus": 0})
    learner = RayLearner(cfg, faults.Faults(), actor=faults.HangingLearner)  # type: ignore[arg-type]
    wait_until_ready(learner, samplers=0)
    with pytest.raises(LearnerDied, match=r"learner\.answer_seconds=1"):
        learner.update([]).result(timeout=30)
    with pytest.raises(RayActorError):
        ray.get(learner.actors[0].ready.remote(), timeout=30)


def test_a_learner_that_is_lost_while_it_is_built_is_named_with_what_needs_less(folder: Path, running: Config) -> None:
    cfg = config(folder, learner={"cpus": 0})
    learner = RayLearner(cfg, faults.Faults(), actor=faults.LostLearner)  # type: ignore[arg-type]
    with pytest.raises(LearnerDied, match=r"the learner was lost before it was built: .*learner\.dtype=bfloat16 takes half"):
        wait_until_ready(learner, samplers=0)
    with pytest.raises(LearnerDied, match="lost before it was built"):
        learner.restart()


@pytest.mark.chaos
@pytest.mark.parametrize("actor", [faults.OutOfMemoryOnce, faults.LostAdapterOnce])
def test_an_engine_without_memory_or_without_its_adapter_dies_and_is_replaced(
    folder: Path,
    problem: Problem,
    handles: tuple[RayLearner, RaySamplers],
    tmp_path: Path,
    actor: type[SamplerActor],
    record_property: Callable[[str, object], None],
) -> None:
    learner, _ = handles
    # A version for each group, so that a second one is installed.
    cfg = config(folder, actors={"count": 1}, learner={"steps": 6, "warmup_steps": 0, "publish_every": 1, "max_staleness": 0})
    samplers = RaySamplers(cfg, problem, actor=actor)
    requests = Requests(problem.prompts, 8, cfg.sampler.exploration, cfg.seed, cfg.task.max_tokens)
    wait_until_ready(samplers)
    tracker = FakeTracker()
    loop = Orchestrator(cfg, requests, samplers, learner, Replay(cfg.replay), tracker, tmp_path)
    loop.train()
    samplers.close()
    record_property("longest wait of the learner, seconds", round(max(tracker.series("seconds/wait")), 1))
    assert loop.counters.deaths == 1
    assert loop.counters.groups == 6


@pytest.mark.chaos
def test_engines_that_run_out_of_memory_over_every_group_stop_the_run_with_the_cause(
    folder: Path, problem: Problem, handles: tuple[RayLearner, RaySamplers], tmp_path: Path
) -> None:
    learner, _ = handles
    cfg = config(folder, actors={"count": 1, "max_deaths": 1})
    samplers = RaySamplers(cfg, problem, actor=faults.OutOfMemory)
    requests = Requests(problem.prompts, 8, cfg.sampler.exploration, cfg.seed, cfg.task.max_tokens)
    loop = Orchestrator(cfg, requests, samplers, learner, Replay(cfg.replay), FakeTracker(), tmp_path)
    message = "samplers died 2 times with no group in between (actors.max_deaths=1); the last cause: "
    cause = "the engine died: MemoryError: cannot allocate 1 TiB"
    with pytest.raises(RunError, match=f"^{re.escape(message + cause)}$"):
        loop.train()
    samplers.close()
    assert loop.counters.groups == 0


def test_every_sampler_installs_what_the_learner_publishes(problem: Problem, handles: tuple[RayLearner, RaySamplers]) -> None:
    learner, samplers = handles
    wait_until_ready(samplers)
    adapter = learner.adapter(500)
    samplers.publish(adapter)
    installed = lora.installed_by(samplers, adapter, Request(0, problem.prompts[0], (Behaviour(),), seed=0))
    assert [stats["version"] for stats in installed] == [500.0, 500.0]
    assert all(stats["canary_error"] < 1e-3 for stats in installed)


def test_what_the_engine_drew_the_learner_scores_the_same(
    running: Config, problem: Problem, handles: tuple[RayLearner, RaySamplers]
) -> None:
    learner, samplers = handles
    samplers.publish(learner.adapter(600))
    group = samplers.sample(evaluation_request(problem.prompts[0], 0, 48, seed=0, round_=1)).result()
    (score,) = learner.score([group]).result()
    assert group.adapter_version == 600
    assert {trajectory.stop for trajectory in group.trajectories_K} == {"sampled", "forced"}
    for trajectory, log_q in zip(group.trajectories_K, score.log_q_K, strict=True):
        assert float(trajectory.logp_T.sum()) == pytest.approx(log_q, abs=1e-3)


def test_the_exact_evaluation_agrees_with_the_samples_it_draws(
    running: Config, problem: Problem, handles: tuple[RayLearner, RaySamplers]
) -> None:
    learner, samplers = handles
    samplers.publish(learner.adapter(501))
    exact = evaluation.exact(problem, learner)
    drawn = evaluation.sampled(problem.prompts, samplers, learner, samples=64, temperature=1.0, seed=0, round_=0, decode=str)
    assert 0.0 <= exact.metrics["exact/listed_mass"] <= 1.0
    assert drawn.metrics["posterior/log_z_lower"] <= drawn.metrics["posterior/log_z_weighted"] + 1e-9
    valid = sum(sample["log_reward"] == 0.0 for sample in drawn.samples) / 64
    assert valid == pytest.approx(exact.metrics["exact/listed_mass"], abs=0.25)
