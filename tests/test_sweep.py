"""A sweep of real jobs of a tiny model, and the command's mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from mlflow import MlflowClient

from deploy import sweep
from system.config import ConfigError
from tests import tiny

ROOT = Path(__file__).parent.parent


def test_every_combination_is_a_run() -> None:
    assert list(sweep.combinations(["seed=0,1", "learner.lr=1e-3,3e-4"])) == [
        ["seed=0", "learner.lr=1e-3"],
        ["seed=0", "learner.lr=3e-4"],
        ["seed=1", "learner.lr=1e-3"],
        ["seed=1", "learner.lr=3e-4"],
    ]


@pytest.mark.parametrize(
    "values",
    [
        ["{kind: subtb, decay: 0.9}", "{kind: pooled}"],
        ["[0.9, 0.99]", "[0.8, 0.9]"],
        ["'Once, {before}'", '"Then, {before}"'],
        ["null", "1e-3", "C:/models/a b", "http://127.0.0.1:5000", "tests.faulty:slow"],
    ],
)
def test_commas_inside_brackets_and_quotes_are_part_of_a_value(values: list[str]) -> None:
    assert list(sweep.combinations(["key=" + ",".join(values)])) == [[f"key={value}"] for value in values]
    assert list(sweep.combinations(["key=" + ", ".join(values)])) == [[f"key={value}"] for value in values]


@pytest.mark.parametrize("text", ["seed", "=1,2", "seed="])
def test_what_is_no_axis_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="such as --over seed=0,1,2"):
        list(sweep.combinations([text]))


@pytest.mark.parametrize("values", ["0,,1", "[1,2", "a],[b", "'open"])
def test_values_that_are_no_list_are_refused(values: str) -> None:
    with pytest.raises(ConfigError, match="the values are no YAML list; put a text in quotes"):
        list(sweep.combinations([f"key={values}"]))


def test_a_wrong_value_is_refused_before_the_first_run_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([str(ROOT / "deploy/configs/random_number.yaml"), "--over", "learner.steps=10,-1"]) == 2
    assert "learner.steps=-1" in capsys.readouterr().err


def test_each_run_is_a_job_under_one_sweep_and_a_failure_is_named_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(_: sweep.Jobs, arguments: list[str]) -> bool:
        commands.append(arguments)
        return "seed=1" not in arguments

    monkeypatch.setattr(sweep.Jobs, "run", run)
    config = str(ROOT / "deploy/configs/random_number.yaml")
    assert sweep.main([config, "learner.steps=10", "--over", "seed=0,1,2"]) == 1
    assert [command[:3] for command in commands] == [[config, "learner.steps=10", f"seed={seed}"] for seed in range(3)]
    (name,) = {command[3] for command in commands}
    assert name.startswith("tracking.sweep=random_number-sweep-")
    assert capsys.readouterr().err.splitlines()[-1].endswith("failed: seed=1")


def test_a_sweep_may_go_over_an_entry_of_a_list_that_the_file_leaves_at_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep.Jobs, "run", lambda *_: True)
    config = tmp_path / "config.yaml"
    config.write_text("task: {kind: verifiable}\n")
    assert sweep.main([str(config), "--over", "task.reward.of.1.beta=0.05,0.1"]) == 0
    assert "run 2 of 2: task.reward.of.1.beta=0.1" in capsys.readouterr().err
    assert sweep.main([str(config), "--over", "task.reward.of.2.beta=0.05,0.1"]) == 2
    assert "task.reward.of has 2 entries" in capsys.readouterr().err


class Process:
    """In place of Popen: a job that ends with a status, after it was interrupted or before."""

    status = 0
    interrupted_by: int | None = None
    started: ClassVar[list[Process]] = []

    def __init__(self, _command: list[str]) -> None:
        self.signals: list[int] = []
        self.started.append(self)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None: ...

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def wait(self) -> int:
        if self.interrupted_by:
            signal.raise_signal(self.interrupted_by)
        return self.status


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> type[Process]:
    kind = type("Process", (Process,), {"started": []})
    monkeypatch.setattr(sweep.subprocess, "Popen", kind)
    return kind


SWEEP = [str(ROOT / "deploy/configs/random_number.yaml"), "--over", "seed=0,1"]


@pytest.mark.parametrize("status", [sweep.STOPPED, -signal.SIGTERM])
def test_a_stopped_run_ends_the_sweep(status: int, process: type[Process]) -> None:
    process.status = status
    assert sweep.main(SWEEP) == sweep.STOPPED
    assert len(process.started) == 1


@pytest.mark.parametrize("number", sweep.SIGNALS)
def test_a_signal_goes_to_the_job_and_ends_the_sweep_even_if_the_job_was_just_done(number: int, process: type[Process]) -> None:
    handlers = [signal.getsignal(each) for each in sweep.SIGNALS]
    process.interrupted_by = number
    assert sweep.main(SWEEP) == sweep.STOPPED
    [job] = process.started
    assert job.signals == [number]
    assert [signal.getsignal(each) for each in sweep.SIGNALS] == handlers


def test_a_signal_between_two_jobs_stops_the_next_one_at_once(process: type[Process]) -> None:
    jobs = sweep.Jobs()
    with jobs.hearing():
        assert jobs.run([]) is True
        signal.raise_signal(signal.SIGTERM)
        assert jobs.run([]) is None
    assert process.started[1].signals == [signal.SIGTERM]


@pytest.mark.chaos
@pytest.mark.timeout(600)  # four jobs
def test_runs_of_a_sweep_are_children_of_one_parent_and_one_that_fails_does_not_end_it(tmp_path: Path) -> None:
    settings = {
        "name": "swept",
        "model": {"path": str(tiny.folder(tmp_path))},
        "lora": {"rank": 4},
        "task": {"kind": "random_number", "high": 20},
        "sampler": {"samples_per_prompt": 8, "kv_cache_mb": 16},
        "learner": {"steps": 2, "warmup_steps": 0},
        "tracking": {"model": "tiny-policy"},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "deploy/sweep.py"), "config.json", "--over", "lora.start=no-such-run,null"]
    done = subprocess.run([*command, "--over", "seed=3,4"], cwd=tmp_path, capture_output=True, text=True, timeout=560)
    assert done.returncode == 1
    assert "failed: lora.start=no-such-run seed=3" in done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("headwater")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "headwater.sweep" in run.data.tags]
    whole = [run for run in runs if run is not parent]
    assert sorted(run.data.params["seed"] for run in whole) == ["3", "4"]
    assert {run.data.tags["mlflow.parentRunId"] for run in whole} == {parent.info.run_id}
    assert {run.info.status for run in whole} == {"FINISHED"}
    versions = client.search_model_versions("name = 'tiny-policy'")
    assert len(versions) == 2 and {version.run_id for version in versions} == {run.info.run_id for run in whole}
    assert all(str(version.source).endswith("/adapter") for version in versions)
    for run in whole:
        files = {file.path for file in client.list_artifacts(run.info.run_id, "adapter")}
        assert "adapter/adapter_model.safetensors" in files
