"""The job as its users start it: a process of its own, real vLLM, real Ray, real MLflow."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from system import journal
from system.config import Model
from system.mlflow_views import VIEWS
from system.models import locate
from tests import tiny
from tests.fake_secrets import assert_none_in
from tests.nodes import TwoNodes
from tests.servers import listening

ROOT = Path(__file__).resolve().parents[1]
APART = "second node shares no filesystem"
"""What the test report says of a cluster: it shares one where this user may not hide folders."""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "deploy/job.py"), *arguments]
    log = (folder / f"log-{time.monotonic_ns()}.txt").open("w")
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)


def last_line(process: subprocess.Popen[str], seconds: float = 280) -> dict[str, Any]:
    output, _ = process.communicate(timeout=seconds)
    return json.loads(output.strip().splitlines()[-1])


def doors(job: subprocess.Popen[str]) -> set[tuple[str, int]]:
    """Where a job's processes, those of its Ray and its actors among them, take connections: addresses and ports."""
    driver = psutil.Process(job.pid)
    processes = [driver, *driver.children(recursive=True)]
    names = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            names.add(process.name())
    assert {"gcs_server", "raylet"} <= names and any("Sampler" in name for name in names), names
    return listening(processes)


def prometheus(job: subprocess.Popen[str]) -> set[str]:
    """Names of a job's figures on the port of its Ray that has them."""
    names: set[str] = set()
    for address, port in doors(job):
        # Most of them speak something else.
        with suppress(OSError, HTTPException), urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=1) as page:
            names |= set(re.findall(r"^ray_headwater_(\w+)\{", page.read().decode(errors="replace"), re.MULTILINE))
    return names


def mlflow_run(folder: Path) -> Any:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("headwater").experiment_id])  # type: ignore[union-attr]
    return client, run


def last_step(run_dir: Path) -> int:
    """Of its last checkpoint."""
    return max(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def test_the_main_job_runs_on_the_packaged_model_and_leaves_everything_in_mlflow(tmp_path: Path) -> None:
    job = start(tmp_path, str(ROOT / "deploy/configs/random_number.yaml"), "learner.steps=8", "sampler.samples_per_prompt=32")
    assert job.stdout is not None
    while not job.stdout.readline().startswith("step "):
        assert job.poll() is None
    assert {address for address, _ in doors(job)} == {"127.0.0.1"}
    started = psutil.Process(job.pid).children(recursive=True)
    summary = last_line(job)
    assert job.returncode == 0
    assert len(started) > 5 and psutil.wait_procs(started, timeout=60)[1] == []
    assert summary["steps"] == 8
    assert summary["before"]["exact/kl_target_q"] == pytest.approx(1.62, abs=0.01)
    assert summary["after"]["exact/kl_target_q"] < 0.8

    (run_dir,) = (tmp_path / "runs").iterdir()
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    client, run = mlflow_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["task.kind"] == "random_number"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 8
    wanted = {"log_z", "spread", "ess", "log_q_stop", "staleness", "length/mean", "seconds/update", "exact/kl_target_q"}
    assert wanted <= run.data.metrics.keys()
    speed = VIEWS["headwater-speed"]
    assert set(speed["metrics"]) <= run.data.metrics.keys() and set(speed["params"]) <= run.data.params.keys()
    assert any(name.startswith("system/") for name in run.data.metrics)
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"adapter", "plots", "config.yaml", "summary.json", "tables", "timeline.json"} <= artifacts
    assert {"report.html", "environment.json"} <= artifacts
    report = (run_dir / "report.html").read_text()
    assert "KL(target ‖ q)" in report and report.count("data:image/") >= 8
    assert run.data.tags["environment.torch"] == torch.__version__
    events = json.loads((run_dir / "timeline.json").read_text())["traceEvents"]
    processes = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    done = {name: [e["name"] for e in events if e["pid"] == pid and e["ph"] == "X"] for name, pid in processes.items()}
    assert done["driver"].count("update") == done["learner"].count("update") == 8
    (sampler,) = (spans for name, spans in done.items() if name.startswith("sampler"))
    assert {"generate", "install", "reward"} == set(sampler)
    assert sampler.count("reward") >= 8
    assert 0 <= summary["sampler_idle"] < 1
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["random_number"]

    base = AutoModelForCausalLM.from_pretrained(locate(Model()), dtype=torch.float32)
    tokens = torch.tensor([[504, 1046, 314]])
    with torch.no_grad():
        plain = base(tokens).logits
        tuned = PeftModel.from_pretrained(base, str(run_dir / "adapter"))(tokens).logits
    assert not np.allclose(plain.numpy(), tuned.numpy(), atol=1e-3)


@pytest.mark.chaos
def test_an_interrupted_run_leaves_a_checkpoint_and_resumes_as_the_same_mlflow_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("ab\ncd\nef\ngh\nij\n")
    config = tmp_path / "tiny.yaml"
    config.write_text(
        json.dumps(
            {
                "name": "tiny",
                "model": {"path": str(tiny.folder(tmp_path))},
                "lora": {"rank": 4},
                "task": {"kind": "continuation", "prompts": "prompts.txt", "max_tokens": 6, "held_out": 2},
                "sampler": {"samples_per_prompt": 4, "kv_cache_mb": 16},
                "learner": {
                    "steps": 100000,
                    "publish_every": 1,
                    "max_staleness": 1,
                    "checkpoint_every": 50,
                    "evaluation_samples": 4,
                },
                "tracking": {"sample_table_every": 1},
            }
        )
    )
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    job = start(tmp_path, str(config), "cluster.dashboard=true")
    assert job.stdout is not None
    while not job.stdout.readline().startswith("step "):
        assert job.poll() is None
    assert {address for address, _ in doors(job)} == {"127.0.0.1"}
    wanted = {"loss", "step", "trajectories_total", "sampler_idle_ratio", "learner_idle_ratio"}
    while not wanted <= prometheus(job):
        assert job.poll() is None
    job.send_signal(signal.SIGINT)
    assert last_line(job)["finished"] is False
    assert job.returncode == 130
    (run_dir,) = (tmp_path / "runs").iterdir()
    step = last_step(run_dir)
    assert step > 0

    again = start(tmp_path, "--resume", run_dir.name, f"learner.steps={step + 20}", "cluster.dashboard=false")
    summary = last_line(again)
    assert again.returncode == 0
    assert summary["steps"] == step + 20
    client, run = mlflow_run(tmp_path)
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == list(range(1, step + 21))
    seen = [json.loads(path.read_text())["per_prompt"] for path in (run_dir / "evaluations").glob("step-*.json")]
    assert {row["prompt"] for rows in seen for row in rows} == {"line-4", "line-5"}
    tables = [json.loads(path.read_text())["data"] for path in (run_dir / "tables/samples").glob("*.json")]
    assert {row[0] for rows in tables for row in rows} == {"line-1", "line-2", "line-3"}


def told_in(output: Path, kind: str = "metrics") -> list[dict[str, Any]]:
    """What each entry of the journals of runs under `output` says, of metrics or of tags, while they are written."""
    entries = [entry for path in output.glob("*/journal.jsonl") for entry, _ in journal.read(path)]
    return [entry["values"] for entry in entries if entry["kind"] == kind]


@pytest.fixture
def of_a_user(tmp_path: Path) -> Path:
    """A working directory with a reward of the user's beside the code, which no node has but by it."""
    folder = tmp_path / "of_a_user"
    for name in ("actors", "deploy", "learner", "system"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "images"))
    (folder / "my_rewards.py").write_text("def score(prompt, text, tokens):\n    return -0.25\n")
    return folder


def test_a_submitted_job_runs_on_the_nodes_of_a_cluster_with_a_users_reward_and_can_be_followed_and_stopped(
    tmp_path: Path, of_a_user: Path, record_property: Callable[[str, object], None]
) -> None:
    cluster = TwoNodes(tmp_path)
    record_property(APART, cluster.apart)
    try:
        # The learner fills the head, so that the sampler is the second node's.
        job = [*cluster.entry, "actors.count=1", "learner.cpus=2", "task.reward={kind: function, path: my_rewards:score}"]
        told = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "MY_TOKEN": "x"}
        environment = ["--runtime-env-json", json.dumps({"env_vars": told})]
        submit = ["--submission-id", "long", "--working-dir", str(of_a_user), *environment]
        submitted = cluster.submit("--no-wait", *submit, "--", *job, "learner.steps=100000", f"output_dir={tmp_path}/long")
        assert submitted.returncode == 0, submitted.stdout[-3000:]
        deadline = time.monotonic() + 200
        while not any("loss" in metrics for metrics in told_in(tmp_path / "long")):
            assert time.monotonic() < deadline, cluster.job("logs", "long").stdout[-3000:]
            time.sleep(0.2)
        logs = cluster.job("logs", "long").stdout
        assert "step 1" in logs and "MY_TOKEN came in the job's env_vars, which Ray writes into its logs" in logs
        assert "RUNNING" in cluster.job("status", "long").stdout
        assert cluster.job("stop", "long").returncode == 0
        assert "was stopped" in cluster.job("status", "long").stdout
        (run_dir,) = (tmp_path / "long").iterdir()
        assert list((run_dir / "checkpoints").glob("step-*"))
        assert json.loads((run_dir / "summary.json").read_text())["finished"] is False
        run = mlflow_run(tmp_path)[1]
        assert run.info.status == "KILLED"
        nodes = {run.data.tags[f"node.{name}"].split()[-1] for name in ("learner", "sampler-0")}
        assert len(nodes) == 2
        assert {metrics["log_reward/mean"] for metrics in told_in(tmp_path / "long") if "loss" in metrics} == {-0.25}
        # What the nodes were started with reaches the job, and no log of Ray's.
        assert_none_in(tmp_path, *cluster.temporary, holding={"mlflow.db", "journal.jsonl", "runtime_env_agent.log"})
    finally:
        cluster.close()


@pytest.mark.chaos
@pytest.mark.timeout(1200)  # four jobs
def test_a_submitted_job_grows_over_the_nodes_and_goes_on_after_its_driver_and_then_all_of_its_cluster_were_killed(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def actors() -> list[psutil.Process]:
        below = [child for node in cluster.nodes for child in psutil.Process(node.pid).children(recursive=True)]
        return [process for process in below if process.name().startswith(("ray::Sampler", "ray::Learner"))]

    def drivers() -> list[psutil.Process]:
        # Ray has the command in a shell, whose command line holds that of Python.
        found = [
            process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(process.info["cmdline"] or ())
        ]
        return [process for process in found if "deploy/job.py" in (process.info["cmdline"] or ())]

    def system_metrics_of(run_dir: Path) -> set[str]:
        names = {name for metrics in told_in(run_dir.parent) for name in metrics}
        return {name.split("/")[1] for name in names if name.startswith("system/")}

    def nodes_of(run_dir: Path) -> dict[str, str]:
        tags = [tag for tags in told_in(run_dir.parent, "tags") for tag in tags.items()]
        return {name: node.split()[-1] for name, node in tags if name.startswith("node.")}

    cluster = TwoNodes(tmp_path)
    record_property(APART, cluster.apart)
    try:
        began = time.monotonic()
        apart = [f"output_dir={tmp_path}/many", f"tracking.uri=sqlite:///{tmp_path}/many.db"]
        many = ["actors.count=9", "cluster.wait_seconds=0", *apart]
        refused = cluster.submit("--working-dir", ".", "--", *cluster.entry, *many)
        assert refused.returncode and "actors.count=9" in refused.stdout, refused.stdout[-3000:]
        assert time.monotonic() - began < 120  # of which most is the start of the job's first process

        growing = ["actors.min=1", "actors.max=2", "learner.steps=1000000", "learner.checkpoint_every=20"]
        identity = ["--no-wait", "--submission-id", "killed", "--working-dir", "."]
        cluster.job("submit", *identity, "--", *cluster.entry, *growing, f"output_dir={tmp_path}/runs")
        crew = {"learner", "sampler-0", "sampler-1"}
        while (
            not (found := list((tmp_path / "runs").glob("*/checkpoints/step-*")))
            or not {"driver", *crew} <= system_metrics_of(found[0].parents[1])
            or not {f"node.{name}" for name in crew} <= nodes_of(found[0].parents[1]).keys()
        ):
            status = cluster.job("status", "killed").stdout
            assert "PENDING" in status or "RUNNING" in status, cluster.job("logs", "killed").stdout[-3000:]
        run_dir = found[0].parents[1]
        assert len(set(nodes_of(run_dir).values())) == 2
        [driver] = drivers()
        driver.kill()
        began = time.monotonic()
        psutil.wait_procs(actors(), timeout=60)
        record_property(
            "seconds from the death of a submitted driver until its actors are gone", round(time.monotonic() - began, 1)
        )
        while "'killed' failed" not in cluster.job("status", "killed").stdout:
            time.sleep(1)
        step = last_step(run_dir)
        assert actors() == []

        again = ["python", "deploy/job.py", "--resume", str(run_dir)]
        cluster.submit("--no-wait", "--submission-id", "resumed", "--working-dir", ".", "--", *again)
        deadline = time.monotonic() + 200
        while last_step(run_dir) == step:
            assert time.monotonic() < deadline, cluster.job("logs", "resumed").stdout[-3000:]
            time.sleep(0.2)
        assert len(drivers()) == 1
        cluster.close(at_once=True)
        assert drivers() == []
        step = last_step(run_dir)

        cluster = TwoNodes(tmp_path)
        result = cluster.submit("--working-dir", ".", "--", *again, f"learner.steps={step + 40}")
        assert result.returncode == 0, result.stdout[-3000:]
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["finished"] is True and summary["steps"] == step + 40
        client, run = mlflow_run(tmp_path)
        assert {point.step for point in client.get_metric_history(run.info.run_id, "loss")} == set(range(1, step + 41))
        assert actors() == []
    finally:
        cluster.close()


@pytest.mark.chaos
def test_a_stop_of_a_submitted_sweep_stops_the_run_at_hand_with_a_checkpoint_and_starts_no_other(tmp_path: Path) -> None:
    cluster = TwoNodes(tmp_path)
    try:
        sweep = ["python", "deploy/sweep.py", *cluster.entry[2:], "actors.count=1", "learner.steps=100000"]
        wait = ["--runtime-env-json", json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})]
        identity = ["--no-wait", "--submission-id", "swept", "--working-dir", "."]
        cluster.submit(*identity, *wait, "--", *sweep, f"output_dir={tmp_path}/runs", "--over", "seed=0,1")
        deadline = time.monotonic() + 200
        while not any("loss" in metrics for metrics in told_in(tmp_path / "runs")):
            assert time.monotonic() < deadline, cluster.job("logs", "swept").stdout[-3000:]
            time.sleep(0.2)
        assert cluster.job("stop", "swept").returncode == 0
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert list((run_dir / "checkpoints").glob("step-*"))
        assert json.loads((run_dir / "summary.json").read_text())["finished"] is False
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        runs = client.search_runs([client.get_experiment_by_name("headwater").experiment_id])  # type: ignore[union-attr]
        parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
        assert len(runs) == 2 and parents == {
            None,
            *(run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags),
        }
    finally:
        cluster.close()
