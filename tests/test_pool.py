"""The pool of samplers over real Ray actors, without models, and over nodes that join and leave."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from actors.sampler import EngineDied
from deploy import ray_cluster
from deploy.placement import Resources
from deploy.pool import RaySamplers
from deploy.ray_learner import RayLearner
from deploy.readiness import wait_until_ready
from learner.replay import Replay
from system.config import Config, ConfigError
from system.config_file import parse
from system.handles import LearnerDied, SamplerDied
from system.orchestrator import Orchestrator
from system.requests import evaluation_request
from system.run_error import RunError
from system.tasks.problem import Problem
from system.trajectory import Group, Prompt, Request, Trajectory
from tests import nodes
from tests.fakes import PROMPTS, FakeLearner, FakeTracker
from tests.faults import Faults, FaultySampler, IdleLearner, assert_each_counts_once, once
from tests.loops import requests_of


def config(folder: Path, actors: dict[str, Any], steps: int = 12, **cluster: Any) -> Config:
    return parse(
        {
            "task": {"kind": "random_number"},
            "sampler": {"samples_per_prompt": 3},
            "actors": actors,
            "learner": {"steps": steps, "warmup_steps": 0, "publish_every": 1, "max_staleness": 2, "checkpoint_every": 100},
            "cluster": {"local_cpus": 5} | cluster,
            "output_dir": str(folder),
        }
    )


def pool(
    cfg: Config, faults: Faults, learner_nodes: Sequence[str] = (), actor: type[FaultySampler] = FaultySampler
) -> RaySamplers:
    samplers = RaySamplers(cfg, faults, lambda: learner_nodes, actor)  # type: ignore[arg-type]
    samplers.publish(0)
    return samplers


def request(number: int, cfg: Config) -> Request:
    return requests_of(cfg).training(number)


def train(
    cfg: Config,
    samplers: RaySamplers,
    on_step: Any = lambda loop, metrics, fresh: None,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Orchestrator:
    requests = requests_of(cfg)
    learner = FakeLearner(**options)
    folder = Path(cfg.output_dir) / "checkpoints"
    loop = Orchestrator(
        cfg, requests, samplers, learner, Replay(cfg.replay), FakeTracker(), folder, on_step=on_step, should_stop=should_stop
    )
    try:
        loop.train()
    finally:
        samplers.close()
    assert samplers._thread.is_alive() is False
    used = [group_id for batch in learner.batches for group in batch for group_id in [group.group_id] * (len(group) // 3)]
    assert len(used) == loop.counters.groups == loop.counters.step
    return loop


class TestOneNode:
    @pytest.fixture(scope="class", autouse=True)
    def connected(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        before = signal.getsignal(signal.SIGTERM)
        ray_cluster.connect(config(tmp_path_factory.mktemp("ray"), {"count": 2}))
        assert signal.getsignal(signal.SIGTERM) is before
        yield
        ray_cluster.disconnect()

    def test_no_prompt_travels_to_an_actor_before_it_is_asked_about(self, tmp_path: Path) -> None:
        class Whole:
            outline = Faults()

            def __reduce__(self) -> Any:
                raise AssertionError("all of the problem is sent")

        cfg, whole = config(tmp_path, {"count": 1}), cast(Problem, Whole())
        learner, samplers = RayLearner(cfg, whole, IdleLearner), RaySamplers(cfg, whole, actor=FaultySampler)
        wait_until_ready(learner, samplers)
        samplers.close()
        learner._end()

    def test_a_sampler_that_hangs_over_a_request_is_replaced_and_the_group_counts_once(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"count": 2, "answer_seconds": 5})
        used: list[int] = []
        samplers = pool(cfg, Faults(hangs=frozenset({4})))
        wait_until_ready(samplers)
        loop = train(cfg, samplers, lambda loop, metrics, fresh: used.extend(group.group_id for group in fresh))
        assert_each_counts_once(used, 12, loop)
        assert loop.counters.deaths == 1

    def test_a_sampler_whose_process_is_stopped_is_killed_and_replaced(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"count": 2, "cpus": 2, "answer_seconds": 5}, steps=20)
        used: list[int] = []
        samplers = pool(cfg, Faults())
        wait_until_ready(samplers)
        victim: int = ray.get(samplers.ready()[0])

        def on_step(loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
            used.extend(group.group_id for group in fresh)
            if loop.counters.step == 5:
                os.kill(victim, signal.SIGSTOP)
            if loop.counters.step == 20:
                # There are CPUs for two samplers alone, so the stopped one has to be truly gone.
                while not (len(samplers._built()) == 2 and victim not in ray.get(samplers.ready())):
                    time.sleep(0.1)
                with pytest.raises(ProcessLookupError):
                    os.kill(victim, 0)

        loop = train(cfg, samplers, on_step)
        assert_each_counts_once(used, 20, loop)
        assert loop.counters.deaths == 1

    def test_a_sampler_that_dies_without_work_is_replaced_at_once(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"count": 2})
        samplers = pool(cfg, Faults())
        wait_until_ready(samplers)
        for victim in ray.get(samplers.ready()):
            before = set(samplers._members)
            os.kill(victim, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while not (set(samplers._members) != before and len(samplers._built()) == 2):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert samplers.deaths == 2
        samplers.close()

    def test_a_sampler_that_is_stopped_while_it_rests_is_found_and_replaced(self, tmp_path: Path) -> None:
        samplers = pool(config(tmp_path, {"count": 1, "answer_seconds": 2}), Faults())
        wait_until_ready(samplers)
        victim: int = ray.get(samplers.ready()[0])
        time.sleep(3)
        assert ray.get(samplers.ready()) == [victim]  # it rested, and gave a sign of life
        os.kill(victim, signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while victim in ray.get(samplers.ready()) if samplers._built() else True:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        samplers.close()

    def test_requests_one_at_a_time_go_to_all_samplers_in_turn(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"count": 2})
        samplers = pool(cfg, Faults())
        wait_until_ready(samplers)
        heard = {name: member.heard for name, member in samplers._members.items()}
        for number in range(2):
            samplers.sample(request(number, cfg)).result(30)
        assert all(member.heard > heard[name] for name, member in samplers._members.items())
        samplers.close()

    def test_work_that_takes_long_is_no_hang_while_answers_come(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"count": 1, "answer_seconds": 4})
        samplers = pool(cfg, Faults(seconds=2))
        wait_until_ready(samplers)
        futures = [samplers.sample(request(number, cfg)) for number in range(30)]  # ten at a time: the last after 6 s
        assert [future.result(60).group_id for future in futures] == list(range(30))
        samplers.close()

    def test_a_group_that_takes_long_is_no_hang_while_its_sampler_gets_further(self, tmp_path: Path) -> None:
        """The verdicts of a slow judge, say."""
        for gets_further in (True, False):
            cfg = config(tmp_path / str(gets_further), {"count": 1, "answer_seconds": 2})
            samplers = pool(cfg, Faults(seconds=4, gets_further=gets_further))
            wait_until_ready(samplers)
            future = samplers.sample(request(0, cfg))
            if gets_further:
                assert future.result(30).group_id == 0
            else:
                with pytest.raises(SamplerDied, match=r"has work and got no further for actors\.answer_seconds=2"):
                    future.result(30)
            samplers.close()

    def test_an_answer_of_a_sampler_that_was_given_up_is_dropped(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"count": 1})
        samplers = pool(cfg, Faults(seconds=0.5))
        wait_until_ready(samplers)
        future = samplers.sample(request(0, cfg))
        (member,) = samplers._members.values()
        while not member.calls:
            time.sleep(0.01)
        given_up = threading.Event()

        def give_up_late() -> None:
            time.sleep(1.5)  # The answer is in the inbox by now, behind this message.
            assert samplers._inbox.qsize() == 1
            samplers._lose(member, "late")
            given_up.set()

        samplers._inbox.put(give_up_late)
        assert given_up.wait(20)
        with pytest.raises(SamplerDied, match="late"):
            future.result(20)
        assert samplers.sample(request(0, cfg)).result(60).group_id == 0
        samplers.close()

    def test_a_sampler_that_cannot_be_built_is_tried_again(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"count": 1})
        samplers = pool(cfg, Faults(failed_builds=1))
        assert samplers.sample(request(0, cfg)).result(60).group_id == 0
        samplers.close()

    def test_a_sampler_that_is_killed_while_it_starts_is_replaced_before_the_run_begins(self, tmp_path: Path) -> None:
        samplers = pool(config(tmp_path, {"count": 2}), Faults(killed_builds=1))
        wait_until_ready(samplers)
        assert len(ray.get(samplers.ready())) == 2
        samplers.close()

        (tmp_path / "again").mkdir()
        samplers = pool(config(tmp_path / "again", {"count": 1, "max_deaths": 1}), Faults(killed_builds=1000))
        with pytest.raises(RuntimeError, match=r"lost before they were built 2 times \(actors.max_deaths=1\)"):
            wait_until_ready(samplers)
        samplers.close()

    def test_samplers_that_can_never_be_built_fail_what_waits_with_the_cause(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"count": 1, "max_deaths": 1})
        samplers = pool(cfg, Faults(failed_builds=1000))
        with pytest.raises(RuntimeError, match=r"2 times in a row.*actors.max_deaths=1.*this actor cannot be built"):
            samplers.sample(request(0, cfg)).result(60)
        samplers.close()

    def test_a_sampler_is_given_no_more_than_fills_its_engine(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"count": 1})
        cfg = cfg.model_copy(update={"sampler": cfg.sampler.model_copy(update={"max_num_seqs": 4})})
        samplers = pool(cfg, Faults(seconds=0.1))
        wait_until_ready(samplers)
        [member] = samplers._members.values()
        most = 0
        futures = [samplers.sample(request(number, cfg)) for number in range(8)]
        while not all(future.done() for future in futures):
            most = max(most, sum(call.samples for call in list(member.calls)))
            time.sleep(0.01)
        assert [future.result().group_id for future in futures] == list(range(8))
        assert most == 3 * cfg.sampler.groups_at_once(3) == 9
        samplers.close()

    def test_a_sampler_with_many_samples_to_score_can_still_say_that_it_gets_further(self, tmp_path: Path) -> None:
        class Scoring(FaultySampler):
            def __init__(self, config: Config, faults: Faults) -> None:
                super().__init__(config, faults)
                self._one_at_a_time = threading.Lock()

            def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> str:
                with self._one_at_a_time:
                    time.sleep(4 if prompt.id == "slow" else 0)
                return prompt.id

        samplers = pool(config(tmp_path, {"count": 1, "answer_seconds": 2}), Faults(gets_further=True), actor=Scoring)
        wait_until_ready(samplers)
        ids = ["slow", *(f"fast {number}" for number in range(100))]
        answers = [samplers.log_reward(Prompt(name, (1,), (1,)), ()) for name in ids]
        assert [answer.result(60) for answer in answers] == ids
        assert samplers.deaths == 0
        samplers.close()

    def test_a_further_sampler_that_can_never_be_built_is_given_up(self, tmp_path: Path) -> None:
        class OneAlone(FaultySampler):
            def __init__(self, config: Config, faults: Faults) -> None:
                if once(config, "first"):
                    super().__init__(config, faults)
                else:
                    self.construct(int, "no number")

        cfg = config(tmp_path, {"min": 1, "max": 2, "max_deaths": 1})
        samplers = pool(cfg, Faults(), actor=OneAlone)
        wait_until_ready(samplers)
        samplers._inbox.put(lambda: setattr(samplers._size, "target", 2))
        deadline = time.monotonic() + 60
        while samplers._failed_starts < 2 or samplers._size.target != 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert samplers.complete()
        assert samplers.sample(request(0, cfg)).result(60).group_id == 0
        samplers.close()

    def test_samplers_that_die_over_every_group_stop_the_run_with_the_cause(self, tmp_path: Path) -> None:
        class OutOfMemory(FaultySampler):  # defined in here, it is sent whole: actors need not import this file and torch
            def sample(self, request: Request, adapter: int) -> Group:
                raise EngineDied("cannot allocate 1 TiB")

        for actor, cause in (
            (FaultySampler, "The actor is dead because its worker process has died. Worker exit type: "),
            (OutOfMemory, "cannot allocate 1 TiB"),
        ):
            cfg = config(tmp_path / actor.__name__, {"count": 1, "max_deaths": 2})
            message = "samplers died 3 times with no group in between (actors.max_deaths=2); the last cause: " + cause
            with pytest.raises(RunError, match=f"^{re.escape(message)}"):
                train(cfg, pool(cfg, Faults(crashes=frozenset(range(100)), always=True), actor=actor))

    def test_the_pool_grows_by_the_work_of_the_training_alone(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"min": 1, "max": 2})
        samplers = pool(cfg, Faults(seconds=0.2))
        wait_until_ready(samplers)
        evaluation = evaluation_request(PROMPTS[0], 0, 3, seed=0, round_=1)
        for future in [samplers.sample(evaluation) for _ in range(3)]:
            future.result(30)
        samplers.fit(0.9)
        time.sleep(0.1)
        assert len(samplers.ready()) == 1
        samplers.close()

    def test_another_sampler_is_started_where_there_is_room_or_nodes_may_join(self, tmp_path: Path) -> None:
        for wait_seconds, room in ((0, False), (60, True)):
            samplers = pool(config(tmp_path, {"min": 1, "max": 2, "cpus": 4}, wait_seconds=wait_seconds), Faults())
            wait_until_ready(samplers)
            deadline = time.monotonic() + 10  # Ray tells of what is taken a moment later
            while samplers._has_room() is not room:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            samplers.close()

    def test_a_sampler_that_no_node_has_room_for_is_given_up_without_a_death(self, tmp_path: Path) -> None:
        samplers = pool(config(tmp_path, {"min": 1, "max": 2, "cpus": 4}, wait_seconds=60), Faults())
        wait_until_ready(samplers)
        assert samplers.sample(request(0, samplers.config)).result(30).group_id == 0  # so that the pool, too, knows it is built
        samplers.config = config(tmp_path, {"min": 1, "max": 2, "cpus": 4, "start_seconds": 1}, wait_seconds=1)
        samplers._inbox.put(lambda: setattr(samplers._size, "target", 2))
        for waiting in (2, 1):
            deadline = time.monotonic() + 10
            while len(samplers.ready()) != waiting:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert (samplers._size.target, samplers.deaths) == (1, 0)
        samplers.close()

    def test_a_pool_that_has_ended_keeps_nobody_who_wants_room_waiting(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        samplers = pool(config(tmp_path, {"count": 1}), Faults())
        wait_until_ready(samplers)
        monkeypatch.setattr("deploy.pool.ROOM_SECONDS", 0.1)
        monkeypatch.setattr(ray_cluster, "has_room", lambda each, copies: False)
        samplers.close()
        with samplers.room(Resources(1.0, 0.0), 1):
            pass

    def test_the_pool_grows_while_the_learner_waits_and_there_is_room(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"min": 1, "max": 2}, steps=2000)
        samplers = pool(cfg, Faults(seconds=0.1))
        wait_until_ready(samplers)
        sizes: list[int] = []
        enough = threading.Event()

        def on_step(loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
            samplers.fit(metrics["idle/learner"])
            sizes.append(len(samplers._built()))
            if sizes[-1] == 2:
                enough.set()

        loop = train(cfg, samplers, on_step, should_stop=enough.is_set)
        assert (sizes[0], sizes[-1]) == (1, 2)
        assert loop.counters.deaths == 0

    def test_a_sampler_that_has_had_no_work_for_long_goes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("deploy.pool_size.SPARE_STEPS", 3)
        cfg = config(tmp_path, {"min": 1, "max": 2})
        samplers = pool(cfg, Faults())
        wait_until_ready(samplers)
        samplers._size.target = 2
        while len(samplers._built()) < 2:
            time.sleep(0.1)
        sizes = []
        for number in range(5):
            assert samplers.sample(request(number, cfg)).result(30).group_id == number
            samplers.fit(learner_idle=0.9)
            sizes.append(len(samplers._members))
        assert (sizes[1], sizes[-1], samplers.deaths) == (2, 1, 0)
        samplers.close()


class TestNodes:
    """A head, of 2 CPUs unless the test says otherwise, and nodes that join and leave."""

    @pytest.fixture
    def cluster(self, request: pytest.FixtureRequest) -> Iterator[Cluster]:
        with nodes.cluster(head_cpus=getattr(request, "param", 2)) as cluster:
            yield cluster

    def nodes_of(self, samplers: RaySamplers) -> list[str]:
        return [ray.get(member.actor.node.remote(), timeout=60) for member in samplers._members.values()]

    @pytest.mark.chaos
    def test_samplers_come_and_go_with_the_nodes(self, cluster: Cluster, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"min": 1, "max": 3}, steps=400, address=cluster.address)
        ray_cluster.connect(cfg)
        (head,) = ray_cluster.nodes()
        # The learner is not a real one here: one CPU of the two is left for it.
        actor: Any = ray.remote(FaultySampler)
        holder = actor.options(num_cpus=1).remote(cfg, Faults())
        ray.get(holder.ready.remote())
        samplers = pool(cfg, Faults(seconds=0.5), learner_nodes=[head])
        wait_until_ready(samplers)
        used: list[int] = []
        sizes: list[int] = []
        joined: list[Any] = []

        def on_step(loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
            used.extend(group.group_id for group in fresh)
            samplers.fit(metrics["idle/learner"])
            sizes.append(len(samplers._built()))
            if loop.counters.step == 20:
                joined.append(cluster.add_node(num_cpus=2))
            if loop.counters.step > 20 and len(samplers._built()) == 3 and len(joined) == 1:
                other = next(node for node in ray_cluster.nodes() if node != head)
                assert sorted(self.nodes_of(samplers)) == sorted([head, other, other])
                cluster.remove_node(joined[0], allow_graceful=False)
                joined.append(None)

        loop = train(cfg, samplers, on_step)
        assert set(sizes[:20]) == {1}
        assert len(joined) == 2
        assert 1 <= loop.counters.deaths <= 2
        assert_each_counts_once(used, 400, loop)

    @pytest.mark.chaos
    def test_a_learner_whose_node_is_gone_takes_the_place_of_a_sampler(self, cluster: Cluster, tmp_path: Path) -> None:
        cfg = config(tmp_path, {"cpus": 2}, address=cluster.address, wait_seconds=60)
        ray_cluster.connect(cfg)
        (head,) = ray_cluster.nodes()
        samplers = pool(cfg, Faults())
        wait_until_ready(samplers, samplers=0)
        joined = cluster.add_node(num_cpus=3)
        learner = RayLearner(cfg, Faults(), IdleLearner)  # type: ignore[arg-type]
        learner.room = samplers.room
        wait_until_ready(learner, samplers=0)
        assert ray.get(learner.actors[0].node.remote()) != head
        cluster.remove_node(joined, allow_graceful=False)
        with pytest.raises(RayError):
            while True:
                ray.get(learner.actors[0].node.remote(), timeout=60)
        future = samplers.sample(request(0, cfg))
        assert future.result(60).group_id == 0
        # Until Ray has noticed that the node is gone, a new learner may be sent there: the loop starts another.
        for _ in range(5):
            try:
                learner.restart()
                break
            except LearnerDied:
                continue
        assert ray.get(learner.actors[0].node.remote()) == head
        assert samplers._built() == []
        waiting = samplers.sample(request(1, cfg))
        cluster.add_node(num_cpus=2)
        assert waiting.result(90).group_id == 1
        samplers.close()

    def test_what_no_node_can_hold_is_refused_within_seconds_and_waited_for_if_nodes_may_join(
        self, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("deploy.readiness.TELL_SECONDS", 1.0)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"actors.count=1: learner.cpus=1 and 1 x actors.cpus=3 need 4 cpus.* has 2"):
            ray_cluster.connect(config(tmp_path, {"cpus": 3}, address=cluster.address))
        ray_cluster.disconnect()
        assert time.monotonic() - began < 15

        cfg = config(tmp_path, {"cpus": 3}, address=cluster.address, wait_seconds=4)
        ray_cluster.connect(cfg)
        samplers = pool(cfg, Faults())
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"1 x actors.cpus=3 need 4 cpus.* has 2"):
            wait_until_ready(samplers)
        assert 4 <= time.monotonic() - began < 15
        assert "1 of 1 actors are not placed and built after 1 s; the cluster has 2 CPU, 0 GPU, of which 2 CPU" in caplog.text
        cluster.add_node(num_cpus=3)
        wait_until_ready(samplers)
        samplers.close()

    @pytest.mark.parametrize("cluster", [4], indirect=True)
    def test_samplers_keep_off_the_node_of_the_learner_until_the_others_are_full(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        cluster.add_node(num_cpus=4)
        for count, beside_learner in ((2, 0), (5, 1)):
            cfg = config(tmp_path / str(count), {"count": count}, address=cluster.address)
            ray_cluster.connect(cfg)
            while not ray_cluster.has_room(Resources(1.0, 0.0), 8):  # what the first case held takes a moment
                time.sleep(0.1)
            learner = RayLearner(cfg, Faults(), IdleLearner)  # type: ignore[arg-type]
            samplers = pool(cfg, Faults(), learner.nodes)
            wait_until_ready(learner, samplers)
            home: str = ray.get(learner.actors[0].node.remote())
            assert [home] == learner.nodes
            assert len(samplers._built()) == count
            assert self.nodes_of(samplers).count(home) == beside_learner
            samplers.close()
            ray_cluster.disconnect()

    def test_samplers_share_a_gpu_and_more_than_fill_it_are_refused_within_seconds(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        joined = cluster.add_node(num_cpus=4, num_gpus=1)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"actors.count=3: .*3 x actors.gpus=0.5 need 1.5 gpus, but the cluster has 1; "):
            ray_cluster.connect(config(tmp_path, {"count": 3, "gpus": 0.5}, address=cluster.address))
        ray_cluster.disconnect()
        assert time.monotonic() - began < 15

        cfg = config(tmp_path, {"count": 2, "gpus": 0.5}, address=cluster.address)
        ray_cluster.connect(cfg)
        samplers = pool(cfg, Faults())
        wait_until_ready(samplers)
        assert self.nodes_of(samplers) == [joined.node_id] * 2
        seen = [member.actor.__ray_call__.remote(lambda actor: ray.get_gpu_ids()) for member in samplers._members.values()]
        assert ray.get(seen) == [[0], [0]]
        samplers.close()
