"""What a job puts together without its cluster: what its loop trains on, and what its evaluations are of."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.job import Begun, Job
from deploy.prepare import prepare
from system import evaluation
from system.config_file import parse
from system.evaluation import Evaluation
from system.orchestrator import Orchestrator
from system.tasks.problem import Problem
from tests import tiny
from tests.fakes import FakeLearner, FakeSamplers, FakeTracker


class Samplers(FakeSamplers):
    def close(self) -> None: ...

    room: Any = None


class Tracker(FakeTracker):
    """Without what goes to MLflow beside figures."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture
def assembled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Orchestrator, Problem]:
    """The loop of a new run with two prompts to train on and one held out, and its problem."""
    monkeypatch.setattr("deploy.ray_learner.RayLearner", lambda *_: FakeLearner())
    monkeypatch.setattr("deploy.pool.RaySamplers", lambda *_: Samplers())
    monkeypatch.setattr("deploy.ray_metrics.RayMetrics", lambda _: SimpleNamespace(resume=lambda *_: None))
    monkeypatch.setattr("deploy.readiness.wait_until_ready", lambda *_: None)
    tiny.folder(tmp_path)
    (tmp_path / "prompts.txt").write_text("ab\ncab\nb d\n")
    cfg = parse(
        {
            "model": {"path": str(tmp_path / "llama")},
            "task": {"kind": "continuation", "prompts": str(tmp_path / "prompts.txt"), "max_tokens": 4, "held_out": 1},
            "learner": {"reward_temperature": {"start": 2.0, "end": 0.5, "horizon": 50}, "evaluation_samples": 5},
        }
    )
    prepared = prepare(cfg)
    progress: Any = SimpleNamespace(say=lambda text: None)
    tracker: Any = Tracker()
    loop, _ = Job(cfg, tmp_path, resume=False)._assemble(Begun(None, prepared, None), tracker, progress, ExitStack())
    return loop, prepared.problem


def test_a_run_trains_on_all_prompts_but_those_held_out(assembled: tuple[Orchestrator, Problem]) -> None:
    loop, problem = assembled
    assert [prompt.id for prompt in loop.requests.prompts] == ["line-1", "line-2"]
    assert problem.held_out == {"line-3"}


def test_an_evaluation_is_of_what_is_held_out_at_the_last_temperature_with_seeds_of_its_step(
    assembled: tuple[Orchestrator, Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, problem = assembled
    asked: list[tuple[Any, dict[str, Any]]] = []

    def sampled(prompts: Any, samplers: Any, scorer: Any, **how: Any) -> Evaluation:
        asked.append((prompts, how))
        return Evaluation({})

    monkeypatch.setattr(evaluation, "sampled", sampled)
    for step in (0, 7):
        loop.counters.step = step
        loop.evaluate(loop)
        prompts, how = asked.pop()
        assert prompts == problem.prompts[2:]
        assert (how["temperature"], how["samples"], how["seed"], how["round_"]) == (0.5, 5, loop.config.seed, step)
