from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from system.config_file import parse
from system.handles import SamplerDied, SamplerLeft
from system.run_error import RunError
from system.trajectory import Group, Request
from tests.fakes import FakeLearner, FakeSamplers, dies
from tests.loops import config, orchestrator, resume, used

POLICY_GRADIENT: dict[str, object] = {"sampler": {"exploration": {"on_policy": 1}}, "replay": {"fresh": 1}}


@pytest.mark.parametrize(("max_staleness", "publish_every"), [(1, 1), (3, 1), (3, 2), (4, 5)])
def test_staleness_stays_in_bounds_and_every_group_counts_once(tmp_path: Path, max_staleness: int, publish_every: int) -> None:
    # One worker, so that no group overtakes another.
    samplers = FakeSamplers(workers=1, fate=lambda request: time.sleep(0.001 * (request.group_id % 3)))
    learner = FakeLearner(during_update=lambda: time.sleep(0.004))
    loop = orchestrator(tmp_path, config(steps=40, max_staleness=max_staleness, publish_every=publish_every), samplers, learner)
    loop.train()
    staleness = loop.tracker.series("staleness")  # type: ignore[attr-defined]
    assert max(staleness) == max_staleness
    assert loop.counters.too_stale == 0
    assert Counter(samplers.issued).most_common(1)[0][1] == 1
    assert loop.counters.groups == 80
    assert used(learner) == 80 * 3


def test_sampling_goes_on_while_the_learner_works(tmp_path: Path) -> None:
    updating, sampled = threading.Event(), threading.Event()
    went_on: list[bool] = []

    def fate(request: Request) -> None:
        if request.group_id >= 2 and updating.wait(10):
            sampled.set()

    def during_update() -> None:
        updating.set()
        went_on.append(sampled.wait(10))

    orchestrator(tmp_path, config(max_staleness=1, steps=3), FakeSamplers(fate=fate), FakeLearner(during_update)).train()
    assert went_on[0]


def test_the_capacity_gate_bounds_what_is_in_flight_or_unused(tmp_path: Path) -> None:
    samplers, gate = FakeSamplers(workers=8), threading.Event()
    learner = FakeLearner(during_update=lambda: (gate.wait(0.05), None)[1])
    loop = orchestrator(tmp_path, config(max_staleness=2, groups_per_update=2, steps=10), samplers, learner)
    seen: list[int] = []
    loop.on_step = lambda loop, metrics, fresh: seen.append(len(samplers.issued) - loop.counters.groups)
    loop.train()
    assert max(seen) == (2 + 1) * 2 - 2, "less those that the update has used"


def test_a_dead_sampler_costs_no_group(tmp_path: Path) -> None:
    lost = {4, 5, 11}

    def fate(request: Request) -> None:
        if request.group_id in lost:
            lost.discard(request.group_id)
            dies(f"sampler-{request.group_id}")

    samplers, learner = FakeSamplers(fate=fate), FakeLearner()
    loop = orchestrator(tmp_path, config(max_staleness=1), samplers, learner)
    loop.train()
    assert learner.step == 12
    assert loop.counters.deaths == 3
    assert loop.counters.reissued == 3
    assert Counter(samplers.issued)[4] == 2
    assert loop.counters.groups == 24


def test_deaths_go_on_from_those_of_the_checkpoint_without_the_ones_before_the_loop_ran(tmp_path: Path) -> None:
    samplers = FakeSamplers()
    samplers._dead.add("sampler-0")
    loop = orchestrator(tmp_path, config(steps=2), samplers, FakeLearner())
    loop.counters.deaths = 3
    loop.train()
    assert loop.counters.deaths == 3


def test_one_death_that_costs_several_requests_counts_once(tmp_path: Path) -> None:
    lost = {0, 1, 2, 3}

    def fate(request: Request) -> None:
        if request.group_id in lost:
            lost.discard(request.group_id)
            dies("sampler-0")

    loop = orchestrator(tmp_path, config(max_staleness=1), FakeSamplers(fate=fate), FakeLearner())
    loop.train()
    assert loop.counters.deaths == 1
    assert loop.counters.reissued == 4


def test_too_many_deaths_in_a_row_stop_the_run_with_the_cause(tmp_path: Path) -> None:
    numbers = iter(range(1000))
    samplers = FakeSamplers(fate=lambda request: dies(f"sampler-{next(numbers)}"))
    loop = orchestrator(tmp_path, config(), samplers, FakeLearner())
    with pytest.raises(RuntimeError, match=r"actors.max_deaths=3.*killed"):
        loop.train()
    assert loop.counters.deaths >= 4


def test_samplers_that_are_lost_together_count_as_one_death_in_a_row(tmp_path: Path) -> None:
    together, numbers = threading.Barrier(8), iter(range(1000))

    def fate(request: Request) -> None:
        if request.group_id < 8 and (number := next(numbers)) < 8:
            together.wait(10)
            dies(f"sampler-{number}")

    loop = orchestrator(tmp_path, config(max_staleness=3), FakeSamplers(workers=8, fate=fate), FakeLearner())
    loop.train()
    assert (loop.counters.deaths, loop.counters.reissued, loop.counters.groups) == (8, 8, 24)


def test_samplers_that_the_pool_itself_ends_are_no_deaths(tmp_path: Path) -> None:
    numbers = iter(range(1000))

    def fate(request: Request) -> None:
        if (number := next(numbers)) < 10:
            raise SamplerLeft("it gives way", f"sampler-{number}")

    loop = orchestrator(tmp_path, config(), FakeSamplers(fate=fate), FakeLearner())
    loop.train()
    assert (loop.counters.deaths, loop.counters.reissued, loop.counters.groups) == (0, 10, 24)


class ByHand(FakeSamplers):
    """Groups come back when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[int, Future[Group]] = {}
        self.refuses = False

    def sample(self, request: Request) -> Future[Group]:
        if self.refuses:
            raise ConnectionError("no pool")
        self.asked[request.group_id] = Future()
        return self.asked[request.group_id]

    def lose(self, name: str, *numbers: int) -> None:
        for number in numbers:
            self.asked[number].set_exception(SamplerDied("killed", name))


def test_the_capacity_gate_counts_from_the_version_that_samplers_have(tmp_path: Path) -> None:
    samplers = ByHand()
    cfg = config(publish_every=4, max_staleness=3, groups_per_update=1)
    flow = orchestrator(tmp_path, cfg, samplers, FakeLearner()).flow
    flow.counters.step, flow.counters.published_step = 2, 0
    flow.feed()
    assert list(samplers.asked) == [0, 1], "for the updates 2 and 3; for 4 there will be another version"


def test_a_wave_of_deaths_is_one_though_a_group_is_issued_again_to_one_that_has_died_too(tmp_path: Path) -> None:
    """The pool hears of the samplers of a node one after the other."""
    samplers = ByHand()
    flow = orchestrator(tmp_path, config(max_staleness=1), samplers, FakeLearner()).flow
    flow.feed()
    for name, numbers in (("sampler-0", (0,)), ("sampler-1", (1, 0)), ("sampler-2", (2, 0))):
        samplers.lose(name, *numbers)
        flow.receive()
        flow.feed()
    assert flow._waves_in_a_row == 1
    samplers.lose("sampler-3", 1)
    flow.receive()
    assert flow._waves_in_a_row == 2, "all that it had was issued after the others died"


def test_a_group_that_could_not_be_asked_for_is_not_skipped(tmp_path: Path) -> None:
    samplers = ByHand()
    samplers.refuses = True
    flow = orchestrator(tmp_path, config(max_staleness=1), samplers, FakeLearner()).flow
    with pytest.raises(ConnectionError):
        flow.feed()
    assert flow.unused() == [0]
    samplers.refuses = False
    flow.feed()
    assert list(samplers.asked) == [0, 1, 2, 3]


def test_a_sampler_that_refuses_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    def fate(request: Request) -> None:
        raise ValueError("reward is NaN for prompt-1")

    with pytest.raises(ValueError, match="reward is NaN"):
        orchestrator(tmp_path, config(), FakeSamplers(fate=fate), FakeLearner()).train()


class Lossy(FakeSamplers):
    """Leaves out `lost[group_id]` samples of a group, as a sampler does whose reward fails."""

    def __init__(self, lost: dict[int, int]) -> None:
        super().__init__()
        self.lost = lost

    def _work(self, request: Request, version: int) -> Group:
        group = super()._work(request, version)
        lost = self.lost.get(group.group_id, 0)
        kept, rewards = group.trajectories_K[lost:], group.log_reward_K[lost:]
        factors = {name: value_K[lost:] for name, value_K in group.factors_K.items()}
        return replace(group, trajectories_K=kept, log_reward_K=rewards, faults=("log of zero",) * lost, factors_K=factors)


def test_samples_without_a_reward_are_left_out_and_a_group_with_fewer_than_two_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samplers, learner = Lossy({3: 1, 5: 2, 6: 3}), FakeLearner()
    loop = orchestrator(tmp_path, config(), samplers, learner)
    loop.train()
    assert learner.step == 12
    assert samplers.issued == list(range(26)), "two more in place of those given up, and none twice"
    assert {group.group_id for batch in learner.batches for group in batch}.isdisjoint({5, 6})
    assert (loop.counters.reward_faults, loop.counters.given_up, loop.counters.groups) == (6, 2, 24)
    assert used(learner) == 24 * 3 - 1
    assert loop.tracker.series("reward_faults")[-1] == 6  # type: ignore[attr-defined]
    assert loop.tracker.series("groups/given_up")[-1] == 2  # type: ignore[attr-defined]
    assert "group 3: 1 samples have no reward: log of zero" in caplog.text


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (("log of zero", "NaN", "log of zero"), "3 samples have no reward: log of zero; NaN"),
        (tuple("abcdefga"), "8 samples have no reward: a; b; c; d; e; and 2 others"),
    ],
)
def test_the_log_has_each_different_fault_of_a_group_once_and_of_many_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, faults: tuple[str, ...], told: str
) -> None:
    class Faulty(FakeSamplers):
        def _work(self, request: Request, version: int) -> Group:
            return replace(super()._work(request, version), faults=faults if request.group_id == 1 else ())

    orchestrator(tmp_path, config(steps=2), Faulty(), FakeLearner()).train()
    assert [record.getMessage() for record in caplog.records] == [f"group 1: {told}"]


def test_a_group_of_one_that_lost_none_is_used(tmp_path: Path) -> None:
    class Alone(FakeSamplers):
        def _work(self, request: Request, version: int) -> Group:
            group = super()._work(request, version)
            return replace(group, trajectories_K=group.trajectories_K[:1], log_reward_K=group.log_reward_K[:1], factors_K={})

    loop = orchestrator(tmp_path, config(steps=3), Alone(), FakeLearner())
    loop.train()
    assert (loop.counters.groups, loop.counters.given_up) == (6, 0)


def test_too_many_samples_without_a_reward_stop_the_run_and_one_that_is_resumed(tmp_path: Path) -> None:
    cfg = parse(config().model_dump() | {"sampler": {"samples_per_prompt": 3, "max_reward_faults": 3}})
    loop = orchestrator(tmp_path, cfg, Lossy({0: 1, 15: 3}), FakeLearner())
    message = r"4 of the last \d+ samples had no reward, more than sampler.max_reward_faults=3; .* log of zero"
    with pytest.raises(RuntimeError, match=message):
        loop.train()
    # It stopped with a checkpoint, for a mended reward to go on from: nothing is skipped, and no fault counted twice.
    for lost, ends in (({15: 3, 16: 1}, False), ({}, True)):
        learner, samplers = FakeLearner(), Lossy(lost)
        again = orchestrator(tmp_path, cfg, samplers, learner)
        resume(again, learner, tmp_path / "checkpoints")
        assert (again.counters.step, again.counters.reward_faults) == (7, 1)
        if not ends:
            with pytest.raises(RuntimeError, match=r"4 of the last \d+ samples had no reward"):
                again.train()
            continue
        again.train()
        assert sorted(samplers.issued) == list(range(14, 24))
        assert (again.counters.reward_faults, again.counters.groups) == (1, 24)


@pytest.mark.parametrize(("window", "stops"), [(12, False), (48, True)])
def test_a_reward_that_fails_now_and_then_does_not_stop_a_long_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, stops: bool
) -> None:
    monkeypatch.setattr("system.group_flow.FAULT_WINDOW", window)
    cfg = parse(config().model_dump() | {"sampler": {"samples_per_prompt": 3, "max_reward_faults": 1}})
    loop = orchestrator(tmp_path, cfg, Lossy({0: 1, 8: 1, 16: 1}), FakeLearner())
    if stops:
        with pytest.raises(RuntimeError, match="2 of the last"):
            loop.train()
    else:
        loop.train()
        assert loop.counters.reward_faults == 3
    assert len(loop.flow._recent) <= window // 3, "it grows with the window, not with the run"


def test_groups_that_were_issued_and_not_used_are_issued_again_after_a_resume(tmp_path: Path) -> None:
    cfg, stop = config(steps=30, max_staleness=3), threading.Event()
    samplers = FakeSamplers(fate=lambda request: time.sleep(0.002))
    loop = orchestrator(tmp_path, cfg, samplers, FakeLearner(), should_stop=stop.is_set)
    loop.on_step = lambda loop, metrics, fresh: stop.set() if loop.counters.step == 7 else None
    loop.train()
    learner, rest = FakeLearner(), FakeSamplers()
    again = orchestrator(tmp_path, cfg, rest, learner)
    resume(again, learner, tmp_path / "checkpoints")
    again.train()
    assert Counter(rest.issued).most_common(1)[0][1] == 1
    assert again.counters.groups == 60
    assert set(samplers.issued) | set(rest.issued) == set(range(60))


def test_deaths_with_groups_in_between_are_not_in_a_row(tmp_path: Path) -> None:
    lost = set(range(2, 24, 3))

    def fate(request: Request) -> None:
        if request.group_id in lost:
            lost.discard(request.group_id)
            dies(f"sampler-{request.group_id}")

    loop = orchestrator(tmp_path, config(), FakeSamplers(workers=1, fate=fate), FakeLearner())
    loop.train()
    assert (loop.counters.deaths, loop.counters.groups) == (8, 24)


def test_a_group_over_which_samplers_die_again_and_again_ends_the_run_by_its_name(tmp_path: Path) -> None:
    """Groups that come back in between do not hide it."""
    deaths = iter(range(1000))

    def fate(request: Request) -> None:
        time.sleep(0.002)
        if request.group_id == 7:
            dies(f"sampler-{next(deaths)}")

    loop = orchestrator(tmp_path, config(steps=400, max_staleness=50, publish_every=10), FakeSamplers(fate=fate), FakeLearner())
    with pytest.raises(RunError, match=r"4 times in a row over the same group, one of {7: 'prompt-.'} .*last cause: killed"):
        loop.train()
    assert loop.counters.groups > 8


class OneApart(FakeSamplers):
    """Group 0 has a worker of its own, and all others come in their order, however busy the machine is."""

    def sample(self, request: Request) -> Future[Group]:
        if request.group_id:
            return super().sample(request)
        return ThreadPoolExecutor(1).submit(self._work, request, self.version)


@pytest.mark.parametrize(("kind", "used_late"), [("pooled", True), ("vargrad", True), ("grpo", False)])
def test_a_group_that_others_overtook_is_counted_and_used_where_the_loss_is_valid_off_policy(
    tmp_path: Path, kind: str, used_late: bool
) -> None:
    late = threading.Event()

    def fate(request: Request) -> None:
        if request.group_id == 0:
            assert late.wait(60)

    loss = parse(POLICY_GRADIENT | {"task": {"kind": "random_number"}, "loss": {"kind": kind}}).loss
    cfg = config(steps=20, groups_per_update=1, max_staleness=3, publish_every=2).model_copy(update={"loss": loss})
    learner = FakeLearner()
    loop = orchestrator(tmp_path, cfg, OneApart(workers=1, fate=fate), learner)
    loop.on_step = lambda loop, metrics, fresh: late.set() if loop.counters.step == 8 else None
    loop.train()
    assert loop.counters.too_stale == 1
    assert (0 in {group.group_id for batch in learner.batches for group in batch}) == used_late
    assert loop.counters.groups == 20


def test_an_evaluation_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    """Else the training's samples would be drawn while its clock stands still."""
    at: list[int] = []
    loop = orchestrator(
        tmp_path,
        config(steps=12, max_staleness=5, evaluate_every=3),
        FakeSamplers(fate=lambda request: time.sleep(0.005)),
        FakeLearner(),
        evaluate=lambda loop: at.append(loop.flow.in_flight),
    )
    loop.train()
    assert at == [0] * 5
    assert loop.counters.groups == 24
