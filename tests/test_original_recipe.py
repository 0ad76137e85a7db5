"""What the benchmark against the paper's recipe passes on and reports, with runs that have their results already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from system.config import Config
from tests import finished
from tests.benchmarks import original_recipe
from tests.benchmarks.original_recipe import Recipe
from tests.benchmarks.runs import Run


def span(process: int, name: str, start: float, seconds: float, kind: str = "work") -> dict[str, Any]:
    return {"ph": "X", "pid": process, "cat": kind, "name": name, "ts": start, "dur": seconds}


EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 1},
    span(1, "update", 10, 4), span(1, "adapter", 14, 1), span(1, "update", 16, 4), span(1, "adapter", 20, 9),
    span(2, "generate", 9, 9), span(2, "generate", 10, 5), span(3, "generate", 11, 3), span(4, "update", 0, 99, "loop"),
]  # fmt: skip
"""Of ten seconds, an evaluation before them, and two samplers."""


def jobs(monkeypatch: pytest.MonkeyPatch, *evaluations: dict[str, float]) -> list[tuple[str, ...]]:
    """The arguments of our runs, none of which is started."""
    started: list[tuple[str, ...]] = []

    def job(*arguments: str) -> Run:
        started.append(arguments)
        return Run({"trajectories_per_second": 5.0}, list(evaluations), {"traceEvents": EVENTS})

    monkeypatch.setattr(original_recipe, "job", job)
    return started


def test_overrides_of_random_number_reach_our_run_and_the_figures_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = jobs(monkeypatch, {"seconds_training": 2.0, "exact/kl_target_q": 0.01})
    monkeypatch.setattr(original_recipe, "recipe_seconds", lambda *_: (6.0, 0.04, 50))
    original_recipe.random_number("ours", [3], 10.0, ["loss.kind=tb"])
    [arguments] = started
    assert {"seed=3", "loss.kind=tb"} <= set(arguments)
    figure = json.loads(capsys.readouterr().out)
    assert figure["values"] == [3.0]
    assert figure["name"].endswith(" over ours loss.kind=tb")


def test_rates_on_continuation_stand_beside_the_lengths_of_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler: Any = {"samples_per_prompt": 4, "exploration": {"on_policy": 1}}
    _, config = finished.run(tmp_path, task={"min_tokens": 2, "max_tokens": 2}, sampler=sampler)
    recipe = Recipe(config)
    assert recipe.update() == 4
    assert recipe.lengths == [2.0]
    asked: list[Config] = []
    monkeypatch.setattr(original_recipe, "Recipe", lambda cfg: asked.append(cfg) or recipe)
    jobs(monkeypatch, {"posterior/length": 9.0}, {"posterior/length": 7.5})
    original_recipe.continuation(2, [])
    assert [cfg.lora.layers for cfg in asked] == [1.0], "the recipe adapts all layers, whatever ours does"
    detail = json.loads(capsys.readouterr().out)["detail"]
    assert detail["mean_lengths"] == "9.0 to 7.5 / 2.0; 9.0 to 7.5 / 2.0"
    ours, theirs = detail["phases"].split("; ")[0].split(" / ")
    assert ours == "update 0.80, adapter 0.10, generate 0.40"
    assert {"rollout", "backward"} <= {part.split()[0] for part in theirs.split(", ")}
