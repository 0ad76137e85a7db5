"""What a real job leaves when it is killed, interrupted or failing: the same weights after a resume, no process, no secret."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from ray.exceptions import RayTaskError
from safetensors.numpy import load_file

from deploy import job, stop
from system import checkpoint, config_file
from system.adapters import AdapterError
from system.config import ConfigError
from system.handles import LearnerDied, SamplerDied
from system.journal import read
from system.loop_state import Counters, LoopState
from system.run_error import RunError
from system.scores import RewardError
from tests import tiny
from tests.fake_secrets import SECRETS, assert_none_in
from tests.servers import MLflow, Slow
from tests.test_checkpoint import full_disk
from tests.test_tracking import history, recorded

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["ab", "cd", "ef", "gh", "ij"]
STEPS, GROUPS = 24, 2
SECONDS = 400


class Runner:
    """Starts jobs in a folder, with an environment by which every process of theirs can be found, and with fake secrets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = uuid.uuid4().hex
        self.ray = Path(tempfile.mkdtemp(prefix="hw", dir="/tmp"))  # short: Ray puts sockets there
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        config = {
            "name": "tiny",
            "model": {"path": str(tiny.folder(folder))},
            "lora": {"rank": 4},
            "task": {
                "kind": "continuation", "prompts": "prompts.txt", "max_tokens": 6,
                "reward": {"kind": "product", "of": [
                    {"kind": "lm_posterior"}, {"kind": "function", "path": "tests.faulty:slow", "every_prefix": True},
                ]},
            },
            "sampler": {"samples_per_prompt": 4, "kv_cache_mb": 16},
            "replay": {"fresh": 0.5, "prioritised": 0.25, "uniform": 0.25},
            "learner": {
                "steps": STEPS, "groups_per_update": GROUPS, "publish_every": 1, "max_staleness": 0, "checkpoint_every": 5,
                "evaluation_prompts": 2, "evaluation_samples": 4,
            },
            "tracking": {"sample_table_every": 1, "system_metrics_seconds": 1},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | SECRETS | {
            "HEADWATER_TEST": self.marker, "RAY_TMPDIR": str(self.ray), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        with (self.folder / f"log-{time.monotonic_ns()}.txt").open("w") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "deploy/job.py"), *arguments],
                cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*.txt")))

    def processes(self) -> list[psutil.Process]:
        """All that live and were started by a job of this runner's, wherever they hang in the tree of processes."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HEADWATER_TEST") == self.marker and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def names(self) -> set[str]:
        """What its processes are called; an actor of Ray by its class."""
        names = set()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                names.add(process.name().split(".")[0])
        return names

    def assert_nothing_runs(self) -> None:
        deadline = time.monotonic() + 60
        while left := self.processes():
            assert time.monotonic() < deadline, [process.cmdline() for process in left]
            time.sleep(0.2)

    def ended(self, job: subprocess.Popen[str]) -> int:
        """Waits for its end, after which nothing is left running, and returns its exit code."""
        job.communicate(timeout=SECONDS)
        self.assert_nothing_runs()
        return job.returncode

    def kill(self) -> None:
        """All at once, as when a machine goes."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray's own end when the driver is gone
                process.kill()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.ray, ignore_errors=True)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """After one job that nothing happened to, whose run is in `whole`."""
    runner = Runner(tmp_path_factory.mktemp("undisturbed"))
    assert runner.ended(runner.start("config.json", "output_dir=whole")) == 0, runner.logs()[-3000:]
    yield runner
    runner.close()


def run_of(runner: Runner, output_dir: str) -> Path:
    (run_dir,) = (runner.folder / output_dir).iterdir()
    return run_dir


def wait_until(condition: Callable[[], Any], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def updates(run_dir: Path) -> int:
    """That were logged, those among them that were done again."""
    return sum("loss" in entry.get("values", ()) for entry, _ in read(run_dir / "journal.jsonl"))


def drawn(run_dir: Path) -> list[list[tuple[str, str]]]:
    """By update: (prompt, text) of each fresh sample."""
    tables = [json.loads(path.read_text()) for path in sorted((run_dir / "tables/samples").glob("*.json"))]
    return [[(row[0], row[1]) for row in table["data"]] for table in tables]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.chaos
@pytest.mark.timeout(1800)  # six jobs
def test_a_killed_and_an_interrupted_run_end_with_the_weights_of_one_that_was_not(
    runner: Runner, undisturbed: Runner, record_property: Callable[[str, object], None]
) -> None:
    def resumed(after: str) -> subprocess.Popen[str]:
        began, before = time.monotonic(), updates(run_dir)
        job = runner.start("--resume", str(run_dir))
        wait_until(lambda: updates(run_dir) > before, job)
        record_property(
            f"seconds from --resume after {after} to the end of the next update", round(time.monotonic() - began, 1)
        )
        return job

    job = runner.start("config.json", "output_dir=cut")
    wait_until(lambda: list(runner.folder.glob("cut/*/checkpoints/step-00000005")), job)
    assert len(runner.processes()) > 4, "driver, learner, sampler, its function, and Ray's own"
    job.kill()
    assert runner.ended(job) == -signal.SIGKILL
    run_dir = run_of(runner, "cut")
    assert not (run_dir / "adapter").exists()

    job = resumed("SIGKILL of the driver")
    wait_until(lambda: list(run_dir.glob("checkpoints/step-00000010")), job)
    assert {"python", "gcs_server", "raylet", "ray::LearnerActor", "ray::SamplerActor"} <= runner.names()
    runner.kill()
    assert runner.ended(job) == -signal.SIGKILL

    job = resumed("SIGKILL of every process")
    wait_until(lambda: list(run_dir.glob("checkpoints/step-00000015")), job)
    # As a terminal does, at Ctrl-C and when it is closed.
    for number, after in ((signal.SIGINT, "Ctrl-C"), (signal.SIGHUP, "a hangup")):
        os.killpg(job.pid, number)
        assert runner.ended(job) == 130, runner.logs()[-3000:]
        assert json.loads((run_dir / "summary.json").read_text())["steps"] < STEPS
        job = resumed(after)
    assert runner.ended(job) == 0, runner.logs()[-3000:]
    reference = run_of(undisturbed, "whole")
    assert drawn(run_dir) == drawn(reference)
    assert weights(run_dir) == weights(reference)
    groups = [prompt for rows in drawn(run_dir) for prompt, _ in rows[:: len(rows) // GROUPS]]
    assert len(groups) == STEPS * GROUPS
    epochs = [groups[at : at + len(PROMPTS)] for at in range(0, len(groups) - len(PROMPTS) + 1, len(PROMPTS))]
    assert all(sorted(epoch) == [f"line-{number}" for number in range(1, 6)] for epoch in epochs)
    wrote = {"mlflow.db", "journal.jsonl", "config.yaml", "summary.json", "raylet.out"}
    assert_none_in(undisturbed.folder, undisturbed.ray, holding=wrote)


@pytest.mark.chaos
@pytest.mark.timeout(900)  # two jobs
def test_ctrl_c_ends_a_job_that_starts_and_a_second_one_a_job_that_stops(runner: Runner) -> None:
    job = runner.start("config.json", "output_dir=starting")
    wait_until(lambda: {"ray::LearnerActor", "ray::SamplerActor"} & runner.names(), job)
    os.killpg(job.pid, signal.SIGINT)
    time.sleep(0.3)
    job.send_signal(signal.SIGINT)  # as a sweep, which heard it too, passes it on
    assert runner.ended(job) == 130, runner.logs()[-3000:]
    assert "stopped at once" in runner.logs()

    # The stop waits for a server that takes connections and answers nothing.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"tracking.uri=http://127.0.0.1:{silent.getsockname()[1]}"
        job = runner.start("config.json", "output_dir=stopping", uri, f"tracking.close_seconds={2 * SECONDS}")
        wait_until(lambda: list(runner.folder.glob("stopping/*/checkpoints/step-00000005")), job)
        os.killpg(job.pid, signal.SIGINT)
        wait_until(lambda: list(runner.folder.glob("stopping/*/report.html")), job)
        time.sleep(stop.AGAIN_SECONDS)
        os.killpg(job.pid, signal.SIGINT)
        assert runner.ended(job) == 130, runner.logs()[-3000:]
    for name in ("starting", "stopping"):
        ends = [entry["status"] for entry, _ in read(run_of(runner, name) / "journal.jsonl") if entry["kind"] == "status"]
        assert ends == ["KILLED"]
    assert "Traceback" not in runner.logs()


@pytest.mark.chaos
@pytest.mark.timeout(600)  # three jobs
def test_a_refused_resume_changes_nothing_and_a_finished_run_resumes_to_the_summary_that_it_had(runner: Runner) -> None:
    def ended(*arguments: str) -> int:
        return runner.ended(runner.start(*arguments))

    def summary() -> dict[str, Any]:
        return json.loads((run_dir / "summary.json").read_text())

    assert ended("config.json", "output_dir=done") == 0, runner.logs()[-3000:]
    run_dir = run_of(runner, "done")
    first, config, trained = summary(), (run_dir / "config.yaml").read_bytes(), weights(run_dir)
    assert f"sqlite:///{runner.folder}/mlflow.db" in config.decode(), "the same database from wherever it is resumed"

    assert ended("--resume", str(run_dir), "lora.alpha=99") == 1
    assert "error: the checkpoint of step" in runner.logs() and "set lora.alpha to what the run began with" in runner.logs()
    assert (run_dir / "config.yaml").read_bytes() == config

    assert ended("--resume", str(run_dir)) == 0, runner.logs()[-3000:]
    assert summary()["before"] == first["before"]
    assert summary()["after"] == pytest.approx(first["after"])
    assert summary()["after"] != summary()["before"]
    assert (weights(run_dir), (run_dir / "config.yaml").read_bytes()) == (trained, config)


@pytest.mark.chaos
def test_a_reward_that_keeps_failing_ends_the_job_with_its_cause_and_no_process(runner: Runner) -> None:
    reward = "task.reward={kind: function, path: 'tests.faulty:none_at_all', every_prefix: true}"
    assert runner.ended(runner.start("config.json", reward)) == 2
    assert "task.reward.path='tests.faulty:none_at_all' cannot be imported" in runner.logs()

    reward = "task.reward={kind: function, path: 'tests.faulty:always', seconds: 2}"
    assert runner.ended(runner.start("config.json", reward, "sampler.max_reward_faults=5")) == 1
    assert "has two samples with a reward; mend the reward, or draw more samples" in runner.logs()
    assert "the first without one: reward function 'always' failed" in runner.logs()


@pytest.mark.chaos
@pytest.mark.timeout(900)  # two jobs
def test_rewards_that_fail_now_and_then_are_counted_up_to_the_limit_and_with_a_higher_one_the_run_goes_on(
    runner: Runner,
) -> None:
    task = "task={kind: random_number, high: 20, reward: {kind: function, path: 'tests.faulty:digits', seconds: 1}}"
    settings = (task, "learner.steps=8", "learner.evaluation_samples=32")
    job = runner.start("config.json", *settings, "output_dir=now", "sampler.max_reward_faults=5")
    assert runner.ended(job) == 1, runner.logs()[-3000:]
    assert re.search(
        r"^error: \d+ of the last \d+ samples had no reward, more than sampler\.max_reward_faults=5; mend", runner.logs(), re.M
    )
    run_dir = run_of(runner, "now")
    assert checkpoint.read_latest(run_dir / "checkpoints")

    job = runner.start("--resume", str(run_dir), "sampler.max_reward_faults=1000")
    assert runner.ended(job) == 0, runner.logs()[-3000:]
    faults = [
        entry["values"]["reward_faults"] for entry, _ in read(run_dir / "journal.jsonl") if "loss" in entry.get("values", ())
    ]
    assert len(faults) == 8
    assert faults == sorted(faults)
    assert faults[-1] > 5
    for reason in ("ArithmeticError: log of zero", "no answer after 1 s", "returned nan", "returned [0.0, 0.0]"):
        assert reason in runner.logs()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MLflow]:
    (folder := tmp_path / "server").mkdir()
    server = MLflow(folder)
    yield server
    server.kill()


@pytest.mark.chaos
@pytest.mark.timeout(1200)  # two jobs
def test_a_slow_tracking_server_that_is_killed_and_comes_back_has_everything_and_the_run_its_weights(
    runner: Runner, undisturbed: Runner, server: MLflow, record_property: Callable[[str, object], None]
) -> None:
    server.start()
    with Slow(server.uri, seconds=0.5) as slow:
        seconds = _killed_tracking(runner, server, slow)
    record_property("seconds from the tracking server's return until it has what waited", round(seconds, 1))
    run_dir = run_of(runner, "down")
    assert weights(run_dir) == weights(run_of(undisturbed, "whole"))

    run, written = recorded(server.uri, "headwater"), defaultdict[str, list[tuple[int, float]]](list)
    for entry, _ in read(run_dir / "journal.jsonl"):
        for name, value in entry["values"].items() if entry["kind"] == "metrics" else ():
            written[name].append((entry["step"], value))
    assert [step for step, _ in written["loss"]] == list(range(1, STEPS + 1))
    assert set(run.data.metrics) == set(written)
    for name, points in written.items():
        np.testing.assert_equal(history(server.uri, run, name), sorted(points), name)
    client = MlflowClient(server.uri)
    sent = {
        file.path for folder in ("", "adapter", "plots", "tables") for file in client.list_artifacts(run.info.run_id, folder)
    }
    assert {"config.yaml", "summary.json", "report.html", "timeline.json", "adapter/adapter_model.safetensors"} <= sent
    assert run.info.status == "FINISHED"


def _killed_tracking(runner: Runner, server: MLflow, slow: Slow) -> float:
    """Seconds from the server's return until it has all that waited for it."""
    settings = (f"tracking.uri={slow.uri}", "tracking.flush_seconds=0.2", f"tracking.close_seconds={SECONDS}")
    job = runner.start("config.json", "output_dir=down", *settings)
    wait_until(lambda: list(runner.folder.glob("down/*/checkpoints/step-00000005")), job)
    run_dir = run_of(runner, "down")
    wait_until(lambda: json.loads((run_dir / "tracking.json").read_text())["cursors"]["records"], job)
    server.kill()
    wait_until(lambda: list(run_dir.glob("checkpoints/step-00000015")), job)
    assert f"{slow.uri} does not take what is logged" in runner.logs()
    server.start()
    began, waiting = time.monotonic(), (run_dir / "journal.jsonl").stat().st_size
    while min(json.loads((run_dir / "tracking.json").read_text())["cursors"].values()) < waiting and job.poll() is None:
        time.sleep(0.05)  # the job may end as soon as nothing waits
    seconds = time.monotonic() - began
    assert runner.ended(job) == 0, runner.logs()[-3000:]
    assert slow.asked
    return seconds


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for two checkpoints, and not for the third beside them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no test mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def enlarge(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "others").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.chaos
@pytest.mark.timeout(1500)  # four jobs
def test_a_full_disk_ends_a_job_with_one_line_and_with_more_room_it_goes_on(
    disk: Path, runner: Runner, undisturbed: Runner
) -> None:
    def errors() -> list[str]:
        assert "Traceback" not in runner.logs()
        return [line for line in runner.logs().splitlines() if line.startswith("error: ")]

    # Over a checkpoint.
    settings = ("learner.checkpoint_every=1", "tracking.close_seconds=5")
    job = runner.start("config.json", f"output_dir={disk}", *settings)
    assert runner.ended(job) == 1, runner.logs()[-3000:]
    (run_dir,) = disk.iterdir()
    (checkpoints,) = [error for error in errors() if error.startswith(f"error: checkpoint {run_dir}/checkpoints/step-")]
    assert "cannot be written: No space left on device; make room there" in checkpoints
    assert checkpoint.read_latest(run_dir / "checkpoints")

    # Over what follows the last checkpoint: the evaluation, the summary, the report.
    enlarge(disk, "4m")
    job = runner.start("--resume", str(run_dir))
    wait_until(lambda: list(run_dir.glob(f"checkpoints/step-{STEPS:08d}")), job)
    fill(disk)
    assert runner.ended(job) == 1, runner.logs()[-3000:]
    _, other = errors()
    assert other.startswith(f"error: {run_dir}")
    assert "cannot be written: No space left on device; make room there" in other
    assert "--resume" in other
    assert not (run_dir / "report.html").exists()

    enlarge(disk, "8m")
    assert runner.ended(runner.start("--resume", str(run_dir))) == 0, runner.logs()[-3000:]
    assert weights(run_dir) == weights(run_of(undisturbed, "whole"))


@pytest.mark.chaos
@pytest.mark.timeout(900)  # two jobs
def test_a_disk_that_turns_read_only_ends_a_job_with_one_line_and_once_writable_it_goes_on(
    disk: Path, runner: Runner, undisturbed: Runner
) -> None:
    enlarge(disk, "8m")
    job = runner.start("config.json", f"output_dir={disk}", "tracking.close_seconds=5")
    wait_until(lambda: list(disk.glob("*/checkpoints/step-00000005")), job)
    # In front of the disk, which has files open and so cannot be made read-only itself.
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
    try:
        assert runner.ended(job) == 1, runner.logs()[-3000:]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    (run_dir,) = disk.iterdir()
    (error,) = [line for line in runner.logs().splitlines() if line.startswith("error: ")]
    assert str(run_dir) in error
    assert "cannot be written: Read-only file system; make room there or make it writable, then " in error
    assert "Traceback" not in runner.logs()

    assert runner.ended(runner.start("--resume", str(run_dir))) == 0, runner.logs()[-3000:]
    assert weights(run_dir) == weights(run_of(undisturbed, "whole"))


@pytest.mark.chaos
@pytest.mark.timeout(900)  # two jobs
def test_two_ranks_learn_what_one_does_also_where_one_of_them_is_killed(
    runner: Runner, undisturbed: Runner, record_property: Callable[[str, object], None]
) -> None:
    two = ("learner.ranks=2", "learner.cpus=0.5")
    assert runner.ended(runner.start("config.json", "output_dir=two", *two)) == 0, runner.logs()[-3000:]
    one, both = (load_file(run_dir / "adapter/adapter_model.safetensors") for run_dir in (
        run_of(undisturbed, "whole"), run_of(runner, "two"),
    ))  # fmt: skip
    assert max(float(np.abs(one[name] - both[name]).max()) for name in one) < 1e-5

    job = runner.start("config.json", "output_dir=killed", *two)
    wait_until(lambda: list(runner.folder.glob("killed/*/checkpoints/step-00000005")), job)
    *_, last = sorted(
        (process for process in runner.processes() if process.name().startswith("ray::LearnerActor")), key=lambda each: each.pid
    )
    killed, before = time.monotonic(), updates(run_dir := run_of(runner, "killed"))
    last.kill()
    wait_until(lambda: updates(run_dir) > before, job)
    record_property("seconds from the death of a rank to the end of the next update", round(time.monotonic() - killed, 1))
    assert runner.ended(job) == 0, runner.logs()[-3000:]
    assert "the learner died at step" in runner.logs()
    assert weights(run_dir) == weights(run_of(runner, "two"))


def test_a_config_that_cannot_be_written_again_stays_as_it_was(tmp_path: Path) -> None:
    config = config_file.load(ROOT / "deploy/configs/random_number.yaml")
    (tmp_path / "config.yaml").write_text("as it was")
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        job.keep_config(config, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "as it was"


def test_a_finished_run_with_another_task_needs_more_updates(tmp_path: Path) -> None:
    config = config_file.load(ROOT / "deploy/configs/random_number.yaml", ["learner.steps=8"])
    state = LoopState(Counters(step=8), [], ({}, []), config.task.model_dump(mode="json"), np.zeros(1, np.uint8))
    checkpoint.write(tmp_path / "checkpoints", 8, state.files())
    assert job.Job(config, tmp_path, resume=True)._saved().counters.step == 8
    other = config.model_copy(update={"task": config.task.model_copy(update={"high": 50})})
    (tmp_path / "summary.json").write_text("as it was")
    with pytest.raises(ConfigError, match=r"learner\.steps=8: the run has 8 updates, on another task"):
        job.Job(other, tmp_path, resume=True).run()
    assert (tmp_path / "summary.json").read_text() == "as it was"


def test_a_password_in_the_tracking_uri_is_refused_before_anything_is_written(runner: Runner) -> None:
    before = sorted(path.name for path in runner.folder.iterdir())
    job = runner.start("config.json", "tracking.uri=http://me:hw-secret-5e5e@127.0.0.1:9")
    output, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 2
    assert "hw-secret-5e5e" not in output + runner.logs()
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in runner.logs()
    assert sorted(path.name for path in runner.folder.iterdir() if not path.name.startswith("log-")) == before


def test_a_resume_from_a_damaged_checkpoint_is_refused_with_the_one_before(runner: Runner) -> None:
    run_dir = runner.folder / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(config_file.dump(config_file.load(runner.folder / "config.json")))
    checkpoint.write(run_dir / "checkpoints", 5, {"state.json": b"{}"})
    (checkpoint.write(run_dir / "checkpoints", 10, {"state.json": b"{}"}) / "state.json").write_bytes(b"[]")
    job = runner.start("--resume", str(run_dir))
    job.communicate(timeout=SECONDS)
    assert job.returncode == 1
    expected = f"error: checkpoint {run_dir}/checkpoints/step-00000010 is refused: damaged: state.json; step-00000005 is whole"
    assert expected in runner.logs()
    assert "--from-step 5" in runner.logs()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RewardError("prompt 'a', text 'b': log of zero"), 1, "error: prompt 'a', text 'b': log of zero"),
        (AdapterError("adapter 3 is not what the engine runs"), 1, "error: adapter 3 is not what the engine runs"),
        (FloatingPointError("update 7: loss nan"), 1, "error: update 7: loss nan"),
        (RunError("samplers died 4 times"), 1, "error: samplers died 4 times"),
        (SamplerDied("killed", "sampler-3"), 1, "error: sampler-3 is gone: killed"),
        (LearnerDied("no answer"), 1, "error: no answer"),
        (
            OSError(errno.EROFS, "Read-only file system", "a/b"),
            1,
            "error: a/b cannot be written: Read-only file system; make room "
            "there or make it writable, then start the run again",
        ),
        (KeyboardInterrupt("SIGTERM"), 130, "stopped at once, before a checkpoint"),
    ],
)
def test_what_ends_a_job_is_one_line_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: BaseException, code: int, line: str,
) -> None:  # fmt: skip
    def run(_: job.Job) -> None:
        # As errors of an actor arrive.
        of_ray = RayTaskError("score", "Traceback (most recent call last): …", error) if isinstance(error, Exception) else None
        raise of_ray.as_instanceof_cause() if of_ray else error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job.Job, "run", run)
    monkeypatch.setattr(job.Stop, "hear", lambda _: None)
    assert job.main([str(ROOT / "deploy/configs/random_number.yaml")]) == code
    assert capsys.readouterr().err == line + "\n"
