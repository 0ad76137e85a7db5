from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from system import checkpoint
from system.checkpoint import CheckpointError
from system.group_flow import GroupFlow
from system.handles import LearnerDied
from system.learner_config import Replay
from system.loop_state import LoopState
from system.orchestrator import Orchestrator
from system.run_error import RunError
from system.trajectory import Request
from tests.fakes import FakeLearner, FakeSamplers, dies
from tests.loops import config, orchestrator, resume, used


def test_a_synchronous_run_uses_only_samples_of_the_newest_adapter(tmp_path: Path) -> None:
    samplers, learner = FakeSamplers(), FakeLearner()
    loop = orchestrator(tmp_path, config(), samplers, learner)
    loop.train()
    assert learner.step == 12
    assert samplers.issued == list(range(24))
    assert set(loop.tracker.series("staleness")) == {0.0}  # type: ignore[attr-defined]
    assert samplers.named_versions == [version for version in range(12) for _ in range(2)]


def test_a_synchronous_run_is_the_same_in_whatever_order_its_groups_arrive(tmp_path: Path) -> None:
    cfg, batches = config().model_copy(update={"replay": Replay(fresh=0.5, uniform=0.5)}), []
    for name, turn in (("a", 0), ("b", 1)):
        learner = FakeLearner()
        samplers = FakeSamplers(fate=lambda request, turn=turn: time.sleep(0.02 * ((request.group_id + turn) % 2)))
        orchestrator(tmp_path / name, cfg, samplers, learner).train()
        batches.append([[(g.group_id, [t.tokens_T.tolist() for t in g.trajectories_K]) for g in b] for b in learner.batches])
    assert batches[0] == batches[1]
    assert used(learner) > 24 * 3, "some are from the buffer"


def dying(request: Request) -> None:
    dies(f"sampler-{time.monotonic_ns()}")


def refusing(request: Request) -> None:
    raise ValueError("reward is NaN for prompt-1")


def without_any(request: Request) -> None:
    raise RunError("samplers could not be started 4 times in a row")


@pytest.mark.parametrize("end", [dying, refusing, without_any])
def test_a_run_that_its_samplers_end_leaves_what_it_learned(tmp_path: Path, end: Callable[[Request], None]) -> None:
    fate = lambda request: end(request) if request.group_id >= 14 else None  # noqa: E731
    with pytest.raises((RunError, ValueError), match=r"actors.max_deaths=3|reward is NaN|could not be started"):
        orchestrator(tmp_path, config(), FakeSamplers(fate=fate), FakeLearner()).train()
    learner, samplers = FakeLearner(), FakeSamplers()
    again = orchestrator(tmp_path, config(), samplers, learner)
    resume(again, learner, tmp_path / "checkpoints")
    assert again.counters.step == 7
    again.train()
    assert sorted(samplers.issued) == list(range(14, 24))


def test_an_update_that_is_under_way_when_the_samplers_end_the_run_is_counted(tmp_path: Path) -> None:
    updating = threading.Event()

    def fate(request: Request) -> None:
        if request.group_id >= 14:
            updating.wait(10)
            refusing(request)

    def during_update() -> None:
        if first.step == 6:
            updating.set()
            time.sleep(0.3)  # the loop hears of it

    cfg, first = config(max_staleness=1), FakeLearner(during_update)
    with pytest.raises(ValueError, match="reward is NaN"):
        orchestrator(tmp_path, cfg, FakeSamplers(workers=1, fate=fate), first).train()
    second, samplers = FakeLearner(), FakeSamplers(workers=1)
    again = orchestrator(tmp_path, cfg, samplers, second)
    resume(again, second, tmp_path / "checkpoints")
    assert again.counters.step == first.step == 7
    assert second.weights == first.weights
    again.train()
    assert sorted(samplers.issued) == list(range(14, 24))


def test_of_two_errors_at_once_the_samplers_is_logged_and_the_updates_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    updating = threading.Event()

    def fate(request: Request) -> None:
        if request.group_id >= 2:
            updating.wait(10)
            refusing(request)

    def during_update() -> None:
        updating.set()
        time.sleep(0.3)  # the loop hears of it
        raise FloatingPointError("the loss is NaN")

    with pytest.raises(FloatingPointError, match="the loss is NaN"):
        orchestrator(tmp_path, config(max_staleness=1), FakeSamplers(fate=fate), FakeLearner(during_update)).train()
    assert "the samplers had one, which ends the run too: reward is NaN" in caplog.text


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    orchestrator(tmp_path, config(steps=5), FakeSamplers(), FakeLearner()).train()
    files = checkpoint.read_latest(tmp_path / "checkpoints")
    state = json.loads(files["state.json"])
    state["counters"]["of_tomorrow"] = 1
    for changed in ({"state.json": json.dumps(state).encode()}, {"state.json": b"{}"}):
        with pytest.raises(CheckpointError, match="of another version of Headwater"):
            LoopState.of(files | changed)


def test_a_learner_that_fails_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    def during_update() -> None:
        raise FloatingPointError("loss nan")

    with pytest.raises(FloatingPointError, match="loss nan"):
        orchestrator(tmp_path, config(), FakeSamplers(), FakeLearner(during_update)).train()


def test_a_learner_that_fails_leaves_what_it_had_learned(tmp_path: Path) -> None:
    updates = iter(range(1000))

    def during_update() -> None:
        if next(updates) == 7:
            raise FloatingPointError("loss nan")

    with pytest.raises(FloatingPointError, match="loss nan"):
        orchestrator(tmp_path, config(), FakeSamplers(), FakeLearner(during_update)).train()
    learner, samplers = FakeLearner(), FakeSamplers()
    again = orchestrator(tmp_path, config(), samplers, learner)
    resume(again, learner, tmp_path / "checkpoints")
    again.train()
    assert samplers.issued == list(range(14, 24))


def test_a_run_ends_by_its_error_also_where_no_checkpoint_can_be_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> Path:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(ValueError, match="reward is NaN"):
        orchestrator(tmp_path, config(), FakeSamplers(fate=refusing), FakeLearner()).train()
    (said,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert said.getMessage() == "what was learned since the last checkpoint is lost: the disk is full"
    assert said.exc_info is None


def deadly(*deaths: int) -> Any:
    """Kills the learner over its update number n, counted over all that it was asked for, for each n of `deaths`."""
    asked = iter(range(10**6))

    def during_update() -> None:
        if next(asked) in deaths:
            raise LearnerDied("killed")

    return during_update


@pytest.mark.parametrize("deaths", [(0,), (3,), (5,), (8,), (11,), (3, 5, 7), (6, 9, 13)])
def test_a_learner_that_dies_costs_neither_a_group_nor_an_update(tmp_path: Path, deaths: tuple[int, ...]) -> None:
    whole = FakeLearner()
    orchestrator(tmp_path / "whole", config(), FakeSamplers(), whole).train()
    learner, samplers = FakeLearner(deadly(*deaths)), FakeSamplers()
    loop = orchestrator(tmp_path / "killed", config(), samplers, learner)
    steps: list[int] = []
    loop.on_step = lambda loop, metrics, fresh: steps.append(loop.counters.step)
    loop.train()
    assert learner.weights == whole.weights
    assert learner.step == 12
    assert steps == list(range(1, 13))
    assert samplers.issued == list(range(24))
    assert loop.counters.groups == 24
    assert loop.counters.learner_deaths == learner.restarts == len(deaths)
    assert len(learner.published) == len(set(learner.published))
    assert samplers.named_versions == sorted(samplers.named_versions)


def test_a_new_learner_publishes_at_once_what_may_have_been_lost_with_the_old_one(tmp_path: Path) -> None:
    versions = []
    for name, deaths in (("whole", ()), ("killed", (3,))):
        samplers = FakeSamplers()
        loop = orchestrator(tmp_path / name, config(), samplers, FakeLearner(deadly(*deaths)))
        loop.train()
        assert samplers.version == loop.counters.version
        versions.append(loop.counters.version)
    assert versions[1] == versions[0] + 1


def test_no_more_updates_than_checkpoint_every_are_repeated(tmp_path: Path) -> None:
    learner = FakeLearner(deadly(9))
    orchestrator(tmp_path, config(checkpoint_every=5), FakeSamplers(), learner).train()
    assert len(learner.batches) == 12 - 5  # those since the checkpoint of step 5, and no more


def test_a_learner_that_dies_at_any_other_call_is_replaced_too(tmp_path: Path) -> None:
    class Learner(FakeLearner):
        def adapter(self, version: int) -> int:
            adapter = super().adapter(version)
            return fails(adapter) if version == 4 else adapter

        def save(self) -> Any:
            return fails(super().save())

    def fails(value: Any) -> Any:
        if (key := type(value)) not in failed:
            failed.add(key)
            raise LearnerDied("killed")
        return value

    def evaluate(loop: Orchestrator) -> None:
        at.append(loop.counters.step)
        fails("evaluation")

    failed: set[type] = set()
    at: list[int] = []
    learner = Learner()
    loop = orchestrator(tmp_path, config(), FakeSamplers(), learner, evaluate=evaluate)
    loop.train()
    assert loop.counters.learner_deaths == 3
    assert at == [0, 0, 12]
    assert learner.step == 12
    assert loop.counters.groups == 24


def test_a_learner_that_dies_again_and_again_stops_the_run_with_the_cause(tmp_path: Path) -> None:
    learner = FakeLearner(deadly(*range(7, 1000)))
    with pytest.raises(RuntimeError, match=r"died 4 times with no checkpoint.*actors.max_deaths=3.*killed"):
        orchestrator(tmp_path, config(), FakeSamplers(), learner).train()
    assert learner.restarts == 3


def test_a_learner_may_die_more_often_if_checkpoints_lie_between(tmp_path: Path) -> None:
    learner = FakeLearner(deadly(*range(0, 60, 4)))
    loop = orchestrator(tmp_path, config(checkpoint_every=1), FakeSamplers(), learner)
    loop.train()
    assert loop.counters.learner_deaths > 3
    assert learner.step == 12


def test_a_resumed_run_restarts_its_learner_from_the_checkpoint_it_came_from(tmp_path: Path) -> None:
    whole, stop = FakeLearner(), threading.Event()
    orchestrator(tmp_path / "whole", config(), FakeSamplers(), whole).train()
    loop = orchestrator(tmp_path / "cut", config(), FakeSamplers(), FakeLearner(), should_stop=stop.is_set)
    loop.on_step = lambda loop, metrics, fresh: stop.set() if loop.counters.step == 4 else None
    loop.train()
    learner = FakeLearner(deadly(2))
    again = orchestrator(tmp_path / "cut", config(), FakeSamplers(), learner)
    resume(again, learner, tmp_path / "cut" / "checkpoints")
    again.train()
    assert learner.restarts == 1
    assert learner.weights == whole.weights


def test_weights_that_the_caller_has_are_kept_without_asking_a_learner_that_may_be_another_by_now(tmp_path: Path) -> None:
    learner = FakeLearner()
    loop = orchestrator(tmp_path, config(), FakeSamplers(), learner)
    weights = np.frombuffer(np.full(1, 7.0).tobytes(), np.uint8)
    loop.checkpoint(weights)
    assert LoopState.latest(tmp_path / "checkpoints").learner.tobytes() == weights.tobytes()


def test_a_learner_whose_checkpoint_is_damaged_is_not_restarted_from_an_older_one(tmp_path: Path) -> None:
    loop = orchestrator(tmp_path, config(checkpoint_every=3), FakeSamplers(), FakeLearner(deadly(7)))

    def damage(loop: Orchestrator, metrics: dict[str, float], fresh: Any) -> None:
        if loop.counters.step == 7:
            (tmp_path / "checkpoints" / "step-00000006" / "learner.safetensors").write_bytes(b"")

    loop.on_step = damage
    with pytest.raises(CheckpointError, match=r"step-00000006 is refused: damaged.* step-00000003 is whole; .*--from-step 3"):
        loop.train()


def test_a_stop_leaves_a_checkpoint_and_resuming_ends_like_an_uninterrupted_run(tmp_path: Path) -> None:
    cfg = config(steps=9)
    whole = FakeLearner()
    orchestrator(tmp_path / "whole", cfg, FakeSamplers(), whole).train()

    first, stop = FakeLearner(), threading.Event()
    loop = orchestrator(tmp_path / "cut", cfg, FakeSamplers(), first, should_stop=stop.is_set)
    loop.on_step = lambda loop, metrics, fresh: stop.set() if loop.counters.step == 4 else None
    loop.train()
    assert loop.counters.step == 4

    second, samplers = FakeLearner(), FakeSamplers()
    again = orchestrator(tmp_path / "cut", cfg, samplers, second)
    resume(again, second, tmp_path / "cut" / "checkpoints")
    again.train()
    assert second.step == 9
    assert second.weights == whole.weights
    assert again.counters.version > loop.counters.version
    assert samplers.issued == list(range(8, 18))


def test_samples_of_one_prompt_share_one_group_in_an_update(tmp_path: Path) -> None:
    learner = FakeLearner()
    loop = orchestrator(tmp_path, config(groups_per_update=6, steps=2), FakeSamplers(), learner)
    loop.train()
    assert [len(batch) for batch in learner.batches] == [3, 3]
    assert used(learner) == 2 * 6 * 3


def test_evaluations_come_first_last_and_when_due(tmp_path: Path) -> None:
    at: list[int] = []
    loop = orchestrator(
        tmp_path, config(evaluate_every=5), FakeSamplers(), FakeLearner(), evaluate=lambda loop: at.append(loop.counters.step)
    )
    loop.train()
    assert at == [0, 5, 10, 12]


def test_an_evaluation_draws_from_the_weights_that_it_scores(tmp_path: Path) -> None:
    at: list[tuple[int, int]] = []
    loop = orchestrator(
        tmp_path, config(evaluate_every=5, publish_every=4, max_staleness=3), FakeSamplers(), FakeLearner(),
        evaluate=lambda loop: at.append((loop.counters.step, loop.counters.published_step)),
    )  # fmt: skip
    loop.train()
    assert at == [(0, 0), (5, 5), (10, 10), (12, 12)]


def test_an_evaluation_from_log_probs_alone_makes_no_version(tmp_path: Path) -> None:
    learner = FakeLearner()
    settings = config(evaluate_every=5, publish_every=4, max_staleness=3)
    orchestrator(tmp_path, settings, FakeSamplers(), learner, evaluation_draws=False).train()
    assert learner.published == [0, 1, 2, 3], "before the first update, and after 4, 8 and 12"


def test_a_run_that_was_cut_off_before_an_evaluation_has_it_after_a_resume(tmp_path: Path) -> None:
    cfg = config(checkpoint_every=5, evaluate_every=5)

    def resumed(step: int) -> list[int]:
        at: list[int] = []
        learner = FakeLearner()
        again = orchestrator(tmp_path, cfg, FakeSamplers(), learner, evaluate=lambda loop: at.append(loop.counters.step))
        resume(again, learner, tmp_path / "checkpoints", step)
        again.train()
        return at

    orchestrator(tmp_path, cfg, FakeSamplers(), FakeLearner()).train()
    assert resumed(12) == [12]
    assert resumed(10) == [10, 12]


def test_a_run_that_ends_waits_for_no_new_learner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Lost(FakeLearner):
        def save(self) -> Any:
            raise LearnerDied("the cluster is gone")

    learner = Lost()
    with pytest.raises(ValueError, match="reward is NaN"):
        orchestrator(tmp_path, config(), FakeSamplers(fate=refusing), learner).train()
    assert learner.restarts == 0
    assert "what was learned since the last checkpoint is lost" in caplog.text


def test_what_was_learned_is_safe_before_an_evaluation(tmp_path: Path) -> None:
    saved: list[tuple[int, list[str]]] = []

    def evaluate(loop: Orchestrator) -> None:
        saved.append((loop.counters.step, sorted(path.name for path in loop.checkpoints.glob("step-*"))[-1:]))

    loop = orchestrator(
        tmp_path, config(evaluate_every=4, checkpoint_every=100), FakeSamplers(), FakeLearner(), evaluate=evaluate
    )
    loop.train()
    assert saved == [(0, []), (4, ["step-00000004"]), (8, ["step-00000008"]), (12, ["step-00000012"])]


def test_a_stop_is_not_kept_waiting_by_an_evaluation(tmp_path: Path) -> None:
    at: list[int] = []
    stop = threading.Event()
    loop = orchestrator(
        tmp_path, config(evaluate_every=4), FakeSamplers(), FakeLearner(), should_stop=stop.is_set,
        evaluate=lambda loop: at.append(loop.counters.step),
    )  # fmt: skip
    loop.on_step = lambda loop, metrics, fresh: stop.set() if loop.counters.step == 4 else None
    loop.train()
    assert at == [0]
    assert checkpoint.read_latest(tmp_path / "checkpoints", 4)


def test_a_stop_over_the_last_update_leaves_the_evaluation_after_it(tmp_path: Path) -> None:
    stop, at = threading.Event(), []
    orchestrator(
        tmp_path, config(evaluate_every=4), FakeSamplers(), FakeLearner(), should_stop=stop.is_set,
        on_step=lambda loop, metrics, fresh: stop.set() if loop.counters.step == 12 else None,
        evaluate=lambda loop: at.append(loop.counters.step),
    ).train()  # fmt: skip
    assert at == [0, 4, 8, 12]


def test_a_stop_that_comes_before_an_evaluation_begins_has_none(tmp_path: Path) -> None:
    """It was asked for while the loop waited for what was in flight."""
    stop, at = threading.Event(), []

    def fate(request: Request) -> None:
        if request.group_id >= 10:
            stop.set()
            time.sleep(0.05)

    loop = orchestrator(
        tmp_path,
        config(evaluate_every=3, max_staleness=5),
        FakeSamplers(fate=fate),
        FakeLearner(),
        evaluate=lambda loop: at.append((loop.counters.step, stop.is_set())),
        should_stop=stop.is_set,
    )
    loop.train()
    assert loop.counters.step < 12
    assert not any(stopped for _, stopped in at)


def test_an_evaluation_is_no_part_of_the_step_after_it(tmp_path: Path) -> None:
    loop = orchestrator(
        tmp_path, config(evaluate_every=5), FakeSamplers(), FakeLearner(), evaluate=lambda loop: time.sleep(0.5)
    )
    loop.train()
    assert max(loop.tracker.series("seconds/step")) < 0.5  # type: ignore[attr-defined]
    assert loop.counters.seconds < 0.5


def test_what_an_evaluation_waits_for_is_waiting_of_the_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupFlow, "settle", lambda flow, should_stop: time.sleep(0.5))
    loop = orchestrator(tmp_path, config(evaluate_every=5), FakeSamplers(), FakeLearner())
    loop.train()
    settled, idle = (loop.tracker.series(name) for name in ("seconds/settle", "idle/learner"))  # type: ignore[attr-defined]
    assert [step for step, seconds in enumerate(settled) if seconds >= 0.5] == [5, 10]
    assert min(idle[5], idle[10]) > 0.5
    assert loop.counters.seconds - loop.counters.learner_busy_seconds >= 1.0


def test_a_resume_with_another_task_leaves_the_old_buffer_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(steps=6).model_copy(update={"replay": Replay(fresh=0.5, uniform=0.5)})
    orchestrator(tmp_path, cfg, FakeSamplers(), FakeLearner()).train()
    same = orchestrator(tmp_path, cfg, FakeSamplers(), FakeLearner())
    resume(same, FakeLearner(), tmp_path / "checkpoints")
    assert len(same.replay) > 0 and not caplog.text
    changed = cfg.model_copy(update={"task": cfg.task.model_copy(update={"high": 50})})
    other = orchestrator(tmp_path, changed, FakeSamplers(), FakeLearner())
    resume(other, FakeLearner(), tmp_path / "checkpoints")
    assert len(other.replay) == 0
    assert "another than that of the checkpoint, whose replay buffer is left out" in caplog.text


def test_a_resume_with_another_task_begins_with_an_evaluation(tmp_path: Path) -> None:
    orchestrator(tmp_path, config(steps=5), FakeSamplers(), FakeLearner()).train()
    kept = LoopState.latest(tmp_path / "checkpoints")
    for task, expected in ((config().task, [8, 9]), (config().task.model_copy(update={"high": 50}), [5, 8, 9])):
        at: list[int] = []
        cfg = config(steps=9, evaluate_every=4).model_copy(update={"task": task})
        learner = FakeLearner()
        loop = orchestrator(
            tmp_path / str(len(expected)),
            cfg,
            FakeSamplers(),
            learner,
            evaluate=lambda loop, at=at: at.append(loop.counters.step),
        )
        loop.restore(replace(kept, counters=replace(kept.counters)))
        learner.restore(kept.learner, 5)
        loop.train()
        assert at == expected


def test_what_a_learner_takes_to_publish_and_to_save_is_no_wait_for_groups(tmp_path: Path) -> None:
    class Slow(FakeLearner):
        def adapter(self, version: int) -> int:
            time.sleep(0.2)
            return super().adapter(version)

    loop = orchestrator(tmp_path, config(steps=6, publish_every=1, max_staleness=3), FakeSamplers(), Slow())
    loop.train()
    assert min(loop.tracker.series("seconds/step")[1:]) > 0.2  # type: ignore[attr-defined]
    assert max(loop.tracker.series("seconds/wait")) < 0.1  # type: ignore[attr-defined]
    assert loop.counters.seconds - loop.counters.learner_busy_seconds < 0.1 < loop.counters.seconds


def test_as_many_checkpoints_stay_as_the_config_says(tmp_path: Path) -> None:
    orchestrator(tmp_path, config(checkpoint_every=2, keep_checkpoints=4), FakeSamplers(), FakeLearner()).train()
    assert checkpoint.steps(tmp_path / "checkpoints") == [6, 8, 10, 12]


def test_an_update_learns_from_the_buffer_too(tmp_path: Path) -> None:
    cfg, learner = config().model_copy(update={"replay": Replay(fresh=0.5, uniform=0.5)}), FakeLearner()
    loop = orchestrator(tmp_path, cfg, FakeSamplers(), learner)
    loop.train()
    assert used(learner) > 100, "72 are fresh"
    shares = loop.tracker.series("replay/share")  # type: ignore[attr-defined]
    assert shares == pytest.approx([1 - 6 / sum(len(group) for group in batch) for batch in learner.batches])
    assert shares[0] == 0.0


def test_what_an_update_used_is_counted(tmp_path: Path) -> None:
    learner = FakeLearner()
    loop = orchestrator(tmp_path, config(steps=4), FakeSamplers(), learner)
    loop.train()
    groups = [group for batch in learner.batches for group in batch]
    assert loop.counters.trajectories == 4 * 2 * 3
    assert loop.counters.sampled_tokens == sum(group.tokens for group in groups)
    last, logged = learner.batches[-1], loop.tracker.series  # type: ignore[attr-defined]
    ends = [value for group in last for value in group.end_log_reward_K]
    assert logged("log_reward/mean")[-1] == pytest.approx(sum(ends) / len(ends))
    digits = np.concatenate([group.factors_K["digits"] for group in last])
    assert logged("reward/digits")[-1] == pytest.approx(digits.mean())
