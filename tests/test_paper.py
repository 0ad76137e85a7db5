"""The experiments of the paper as commands: each is a config that can be run, and results of several seeds make one table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from system import config_file
from tests.benchmarks.paper import EXPERIMENTS, Lab, table

COMMANDS: list[str] = []
METRICS = {"heldout/task/accuracy": 0.9, "heldout/base/task/accuracy": 0.1}


@dataclass(frozen=True)
class Rehearsal(Lab):
    """Checks the config of a command, and leaves what it would have left."""

    def _run(self, script: str, *arguments: str) -> str:
        COMMANDS.append(script)
        overrides = [argument for argument in arguments[1:] if "=" in argument]
        if script == "self_consistent":
            Path(arguments[1]).write_text("{}\n", encoding="utf-8")
            return ""
        config = config_file.load(Path(arguments[0], "config.yaml") if script == "evaluate" else Path(arguments[0]), overrides)
        if script == "evaluate":
            return "a table\n" + json.dumps(METRICS)
        folder = Path(config.output_dir) / "run"
        (folder / ("adapter" if script == "job" else "gflownet")).mkdir(parents=True)
        (folder / "config.yaml").write_text(config_file.dump(config), encoding="utf-8")
        if script == "baselines":
            methods = [*arguments[arguments.index("--methods") + 1].split(","), "gflownet"]
            (folder / "baselines.json").write_text(json.dumps({"methods": {method: {"x": 1.0} for method in methods}}))
        return ""


@pytest.mark.parametrize("task", EXPERIMENTS)
def test_every_command_of_an_experiment_has_a_config_that_is_accepted(task: str, tmp_path: Path):
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories/train.jsonl").write_text("{}\n", encoding="utf-8")
    rows = EXPERIMENTS[task](Rehearsal(tmp_path, tmp_path, 3, ("learner.steps=20",)))
    [trained] = tmp_path.glob("gflownet-3/*/config.yaml")
    assert config_file.load(trained, []).learner.steps == 20
    assert len(rows) > 1 and "gflownet" in rows


def test_what_has_its_result_is_not_run_again(tmp_path: Path):
    for task, commands in {"verifiable": 4, "constrained": 3}.items():
        COMMANDS.clear()
        (tmp_path / task).mkdir()
        first = EXPERIMENTS[task](Rehearsal(tmp_path, tmp_path / task, 0, ()))
        assert EXPERIMENTS[task](Rehearsal(tmp_path, tmp_path / task, 0, ())) == first
        assert len(COMMANDS) == commands


def test_seeds_of_a_method_are_one_row_with_their_range():
    results = {"0": {"a": {"m": 1.0}, "b": {"n": 5.0}}, "1": {"a": {"m": 3.0}}}
    heads = ["| run | runs | m | n |", "|---|---|---|---|"]
    assert table(results).splitlines() == [*heads, "| a | 2 | 2 (1 to 3) |  |", "| b | 1 |  | 5 |"]


def test_what_goes_to_every_training_reaches_the_baselines_too(tmp_path: Path):
    EXPERIMENTS["verifiable"](Rehearsal(tmp_path, tmp_path, 0, ("learner.steps=30",), ("learner.warmup_steps=4",)))
    runs = {run: config_file.load(next(tmp_path.glob(f"{run}-0/*/config.yaml")), []) for run in ("gflownet", "grpo")}
    assert [cfg.learner.warmup_steps for cfg in runs.values()] == [4, 4]
    assert runs["gflownet"].learner.steps == 30 != runs["grpo"].learner.steps
