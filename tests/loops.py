"""The loop on fakes, as tests of its parts begin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.replay import Replay
from system.config import Config
from system.config_file import parse
from system.loop_state import LoopState
from system.orchestrator import Orchestrator
from system.requests import Requests
from system.trajectory import Prompt
from tests.fakes import PROMPTS, FakeLearner, FakeSamplers, FakeTracker


def config(**learner: Any) -> Config:
    settings = {
        "steps": 12,
        "warmup_steps": 0,
        "groups_per_update": 2,
        "checkpoint_every": 5,
        "publish_every": 1,
        "max_staleness": 0,
    } | learner
    return parse({"task": {"kind": "random_number"}, "learner": settings, "sampler": {"samples_per_prompt": 3}})


def requests_of(cfg: Config, prompts: Sequence[Prompt] = PROMPTS) -> Requests:
    """What a run asks for."""
    return Requests(prompts, cfg.sampler.samples_per_prompt, cfg.sampler.exploration, cfg.seed, cfg.task.max_tokens)


def orchestrator(tmp_path: Path, cfg: Config, samplers: FakeSamplers, learner: FakeLearner, **options: Any) -> Orchestrator:
    return Orchestrator(
        cfg, requests_of(cfg), samplers, learner, Replay(cfg.replay), FakeTracker(), tmp_path / "checkpoints", **options
    )


def resume(loop: Orchestrator, learner: FakeLearner, checkpoints: Path, step: int | None = None) -> None:
    state = LoopState.latest(checkpoints, step)
    loop.restore(state)
    learner.restore(state.learner, loop.counters.step)


def used(learner: FakeLearner) -> int:
    return sum(len(group) for batch in learner.batches for group in batch)
