import json
import logging
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from system.config import Config, ConfigError
from system.config_file import parse
from system.journal import Journal, State, TrackingError
from system.process_metrics import system_metrics
from system.tracking import Tracker, replay
from system.tracking_uri import resolve_uri
from tests.servers import MLflow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests, because creating it takes seconds: each test has its own experiment."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def config(uri: str, experiment: str, **sections: Any) -> Config:
    tracking = {"uri": uri, "experiment": experiment, "flush_seconds": 0.1} | sections.pop("tracking", {})
    return parse({"task": {"kind": "random_number"}, "tracking": tracking} | sections)


def recorded(uri: str, experiment: str) -> Run:
    """The one run of the experiment."""
    (run,) = runs_of(uri, experiment)
    return run


def runs_of(uri: str, experiment: str) -> list[Run]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def recorded_as(uri: str, experiment: str, name: str) -> Run:
    (run,) = [run for run in runs_of(uri, experiment) if run.info.run_name == name]
    return run


def refused(run_dir: Path) -> int:
    """Items that MLflow refused for good."""
    return State.load(run_dir / "tracking.json").refused


def history(uri: str, run: Run, name: str) -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def datasets(run: Run) -> list[Any]:
    assert run.inputs is not None
    return [given.dataset for given in run.inputs.dataset_inputs]


def wait_until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_all_that_a_run_logs_reaches_mlflow(tmp_path, database, monkeypatch):
    monkeypatch.setenv("SOME_API_TOKEN", "hunter2-secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)  # where load_table looks for runs
    run_dir = tmp_path / "run"
    tracker = Tracker(run_dir, config(database, "all", name="first"))
    (run_dir / "adapter" / "sub").mkdir(parents=True)
    (run_dir / "adapter" / "weights.bin").write_text("w")
    (run_dir / "adapter" / "sub" / "more.bin").write_text("m")
    (run_dir / "plot.png").write_text("p")
    for step in range(3):
        tracker.metrics({"loss": 1.0 / (step + 1), "log_z": float("nan"), "lowest": float("-inf")}, step)
    tracker.system("node-1", {"cpu_percent": 50.0}, 0)
    tracker.tags({"git": "abc"})
    tracker.dataset("prompts", [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}], 7, "d1")
    tracker.table("samples", [{"text": "z", "log_reward": float("-inf")}, {"text": "y", "log_reward": -1.5}], 50)
    tracker.artifact(run_dir / "adapter")
    tracker.artifact(run_dir / "plot.png", "plots")
    tracker.close("FINISHED")

    assert (tracker.lag(), refused(run_dir)) == (0, 0)
    run, client = recorded(database, "all"), MlflowClient(database)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["learner.lr"] == "0.001" and run.data.params["task.kind"] == "random_number"
    assert history(database, run, "loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert run.data.metrics["log_z"] != run.data.metrics["log_z"], "NaN stays NaN"
    assert run.data.metrics["lowest"] == -sys.float_info.max
    assert run.data.metrics["system/node-1/cpu_percent"] == 50.0
    assert run.data.tags["git"] == "abc"
    (dataset,) = datasets(run)
    assert (dataset.name, dataset.digest, json.loads(dataset.profile)) == ("prompts", "d1", {"num_rows": 7})
    path = client.download_artifacts(run.info.run_id, "datasets/prompts.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == {"columns": ["id", "text"], "data": [["a", "one"], ["b", "two"]]}
    table = client.load_table(run.info.experiment_id, "tables/samples/000050.json", [run.info.run_id])
    assert table["text"].tolist() == ["z", "y"] and table["log_reward"].isna().tolist() == [True, False]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "adapter/sub")] == ["adapter/sub/more.bin"]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "plots")] == ["plots/plot.png"]
    everything = str(run.data.params) + str(run.data.tags) + (run_dir / "journal.jsonl").read_text()
    assert "hunter2" not in everything


def test_a_resumed_run_goes_on_without_gaps_or_duplicates(tmp_path, database):
    for part in range(2):
        tracker = Tracker(tmp_path, config(database, "resumed", learner={"steps": 10 * (part + 1)}), resume=part > 0)
        tracker.dataset("prompts", [{"id": "a", "text": "one"}], 1, "d1")
        for step in range(part * 5, part * 5 + 5):
            tracker.metrics({"loss": float(step)}, step)
        tracker.close("FINISHED" if part else "FAILED")
        assert (tracker.lag(), refused(tmp_path)) == (0, 0)
    run = recorded(database, "resumed")
    assert run.info.status == "FINISHED"
    assert history(database, run, "loss") == [(step, float(step)) for step in range(10)]
    assert run.data.params["learner.steps"] == "10" and run.data.tags["resumed.learner.steps"] == "20"
    assert len(datasets(run)) == 1


def test_a_run_that_is_amended_keeps_its_end(tmp_path, database):
    first = Tracker(tmp_path, config(database, "amended"))
    first.metrics({"loss": 1.0}, 1)
    first.close("KILLED")
    ended = recorded(database, "amended").info.end_time
    more = Tracker(tmp_path, config(database, "amended", learner={"steps": 7}), amend=True)
    more.metrics({"heldout/loss": 2.0}, 0)
    more.close("FINISHED")
    run = recorded(database, "amended")
    assert (run.info.status, run.info.end_time) == ("KILLED", ended)
    assert run.data.metrics == {"loss": 1.0, "heldout/loss": 2.0}
    assert not any(name.startswith("resumed.") for name in run.data.tags)


def test_runs_of_a_sweep_share_a_parent_however_often_it_was_created(tmp_path, database):
    client, states = MlflowClient(database), []
    for name in ("one", "two"):
        tracker = Tracker(tmp_path / name, config(database, "sweep", name=name, tracking={"sweep": "lr"}))
        tracker.close("FINISHED")
        states.append(recorded_as(database, "sweep", name))
    (parent,) = [run for run in runs_of(database, "sweep") if run.info.run_name == "lr"]
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in states} == {parent.info.run_id}
    # As when another child created one at the same time: the first stays for all.
    client.create_run(parent.info.experiment_id, tags={"headwater.sweep": "lr"}, run_name="lr")
    Tracker(tmp_path / "three", config(database, "sweep", name="three", tracking={"sweep": "lr"})).close("FINISHED")
    assert recorded_as(database, "sweep", "three").data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_an_adapter_becomes_one_version_of_its_model_however_often_it_is_sent(tmp_path, database):
    for name in ("one", "two"):
        run_dir = tmp_path / name
        tracker = Tracker(run_dir, config(database, "versions", name=name))
        (run_dir / "adapter").mkdir()
        (run_dir / "adapter" / "adapter_config.json").write_text("{}")
        tracker.artifact(run_dir / "adapter")
        tracker.model_version("policy", "adapter")
        tracker.close("FINISHED")
        state = json.loads((run_dir / "tracking.json").read_text())
        (run_dir / "tracking.json").write_text(json.dumps(state | {"cursors": {"records": 0, "files": 0}}))
        assert replay(run_dir) == 0
    client = MlflowClient(database)
    versions = {int(version.version): version.run_id for version in client.search_model_versions("name = 'policy'")}
    assert versions == {n: recorded_as(database, "versions", name).info.run_id for n, name in ((1, "one"), (2, "two"))}


def test_what_is_sent_twice_counts_once(tmp_path, database):
    tracker = Tracker(tmp_path, config(database, "twice"))
    for step in range(5):
        tracker.metrics({"loss": float(step), "nan": float("nan")}, step)
    tracker.dataset("prompts", [{"id": "a", "text": "one"}], 1, "d1")
    tracker.close("FINISHED")
    first = recorded(database, "twice")
    state = json.loads((tmp_path / "tracking.json").read_text())
    lost = state | {"run_id": None, "cursors": {"records": 0, "files": 0}}  # as if no acknowledgement had arrived
    (tmp_path / "tracking.json").write_text(json.dumps(lost))

    assert replay(tmp_path) == 0
    run = recorded(database, "twice")
    assert run.info.run_id == first.info.run_id and run.info.end_time == first.info.end_time
    assert history(database, run, "loss") == [(step, float(step)) for step in range(5)]
    assert len(history(database, run, "nan")) == 5 and len(datasets(run)) == 1
    assert refused(tmp_path) == 0


def test_a_torn_last_line_is_counted_and_spoils_no_other(tmp_path, database):
    tracker = Tracker(tmp_path, config(database, "torn"))
    tracker.metrics({"loss": 0.0}, 0)
    tracker.close("FAILED")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "time": 1, "st')
    tracker = Tracker(tmp_path, config(database, "torn"), resume=True)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close("FINISHED")
    assert tracker.lag() == 0
    assert history(database, recorded(database, "torn"), "loss") == [(0, 0.0), (1, 1.0)]
    assert json.loads((tmp_path / "tracking.json").read_text())["unreadable"] == 1


def test_what_mlflow_refuses_does_not_hold_up_the_rest(tmp_path, database, caplog):
    tracker = Tracker(tmp_path, config(database, "refused"))
    tracker.metrics({"loss": 0.0}, 0)
    tracker.metrics({"too_far": 0.0}, 2**70)  # MLflow answers "internal error" to a step beyond 64 bits
    (tmp_path / "gone.txt").write_text("x")
    (tmp_path / "kept.txt").write_text("x")
    tracker.artifact(tmp_path / "gone.txt")
    (tmp_path / "gone.txt").unlink()
    tracker.artifact(tmp_path / "kept.txt")
    tracker.metrics({"loss": 1.0, "after": 1.0}, 1)
    with caplog.at_level(logging.WARNING):
        tracker.close("FINISHED")
    run = recorded(database, "refused")
    assert history(database, run, "loss") == [(0, 0.0), (1, 1.0)]
    assert run.data.metrics["after"] == 1.0 and "too_far" not in run.data.metrics and run.info.status == "FINISHED"
    assert "kept.txt" in [file.path for file in MlflowClient(database).list_artifacts(run.info.run_id)]
    assert (tracker.lag(), refused(tmp_path)) == (0, 2)
    assert "2 in this run" in caplog.text


def test_a_param_that_contradicts_an_earlier_one_is_refused_alone(tmp_path, database):
    tracker = Tracker(tmp_path, config(database, "contradiction"))
    tracker.close("FAILED")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("params", values={"seed": "another", "new": "1"})
    journal.close()
    assert replay(tmp_path) == 0
    params = recorded(database, "contradiction").data.params
    assert (params["seed"], params["new"]) == ("0", "1")
    assert refused(tmp_path) == 1


def test_long_params_and_odd_names_are_made_to_fit(tmp_path, database):
    tracker = Tracker(tmp_path, config(database, "odd", task={"kind": "random_number", "prompt": "x" * 7000}))
    tracker.metrics({"../a%b//c:d": 1.0, "": 2.0, "n" * 400: 3.0}, 0)
    tracker.tags({"long": "y" * 9000})
    tracker.table("a/../b", [{"text": "z"}], 1)
    tracker.close("FINISHED")
    run = recorded(database, "odd")
    assert (tracker.lag(), refused(tmp_path)) == (0, 0)
    assert run.data.params["task.prompt"] == "x" * 6000 and run.data.tags["long"] == "y" * 8000
    assert run.data.metrics == {"_/a_b/c_d": 1.0, "_": 2.0, "n" * 250: 3.0}
    assert (tmp_path / "tables/a/_/b/000001.json").exists()


def test_more_than_a_batch_arrives_whole(tmp_path, database):
    tracker = Tracker(tmp_path, config(database, "many"))
    for step in range(300):
        tracker.metrics({f"metric_{index}": float(step) for index in range(7)}, step)
    tracker.metrics({f"wide_{index}": 1.0 for index in range(2345)}, 0)
    tracker.tags({f"tag_{index}": "x" for index in range(234)})
    tracker.close("FINISHED")
    run = recorded(database, "many")
    assert history(database, run, "metric_6") == [(step, float(step)) for step in range(300)]
    assert sum(name.startswith("wide_") for name in run.data.metrics) == 2345
    assert sum(name.startswith("tag_") for name in run.data.tags) == 234


def test_an_artifact_store_that_fails_does_not_hold_up_metrics(tmp_path, database):
    store = Path(database.removeprefix("sqlite:///")).parent / "mlruns" / "no_store"
    store.parent.mkdir(exist_ok=True)
    store.write_text("a file where MLflow needs a folder")
    tracker = Tracker(tmp_path, config(database, "no_store", tracking={"close_seconds": 2}))
    tracker.table("samples", [{"text": "z"}], 0)
    tracker.metrics({"loss": 1.0}, 0)
    tracker.close("FINISHED")
    run = recorded(database, "no_store")
    assert run.data.metrics == {"loss": 1.0} and run.info.status == "FINISHED"
    assert (tracker.lag(), refused(tmp_path)) == (1, 0)
    store.unlink()
    assert replay(tmp_path) == 0
    assert MlflowClient(database).list_artifacts(run.info.run_id, "tables/samples")


def test_the_journal_of_a_deleted_run_waits_until_it_is_restored(tmp_path, database):
    tracker = Tracker(tmp_path, config(database, "deleted", tracking={"close_seconds": 2}))
    wait_until(lambda: tracker.lag() == 0)
    run = recorded(database, "deleted")
    MlflowClient(database).delete_run(run.info.run_id)
    tracker.metrics({"loss": 1.0}, 0)
    tracker.close("FINISHED")
    assert (tracker.lag(), refused(tmp_path)) == (2, 0)
    MlflowClient(database).restore_run(run.info.run_id)
    assert replay(tmp_path) == 0
    assert recorded(database, "deleted").data.metrics == {"loss": 1.0}


KILLED = """
import os, signal, sys
from pathlib import Path
from system.config_file import parse
from system.tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), parse({"task": {"kind": "random_number"},
    "tracking": {"uri": sys.argv[2], "experiment": "killed", "flush_seconds": 600}}))
for step in range(100):
    tracker.metrics({"loss": float(step)}, step)
tracker.metrics({"too_far": 0.0}, 2**70)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_journal_of_a_killed_process_is_whole_and_is_replayed_by_the_command(tmp_path, database):
    died = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), database], cwd=ROOT, timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    command = [sys.executable, "-m", "system.tracking", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True, check=True)
    assert f"MLflow has all of {tmp_path}, but for 1 that it refused" in done.stdout
    run = recorded(database, "killed")
    assert run.info.status == "KILLED"
    assert history(database, run, "loss") == [(step, float(step)) for step in range(100)]


def test_a_full_disk_is_named_and_leaves_the_journal_whole(tmp_path, database, black_hole, caplog):
    tracker = Tracker(tmp_path, config(black_hole, "full", tracking={"close_seconds": 0}))
    tracker.metrics({"loss": 0.0}, 0)
    size = (tmp_path / "journal.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel takes a part of the next line and refuses the rest, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
    try:
        with pytest.raises(TrackingError, match=r"journal\.jsonl cannot be written: .*; make room there, then --resume"):
            tracker.metrics({"loss": 1.0}, 1)
        assert (tmp_path / "journal.jsonl").stat().st_size == size
        tracker.close("FAILED")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the run's end is not recorded" in caplog.text
    assert replay(tmp_path, database) == 0
    run = recorded(database, "full")
    assert (history(database, run, "loss"), run.info.status) == ([(0, 0.0)], "KILLED")


def test_a_run_folder_has_one_writer_and_is_not_reused_by_accident(tmp_path, database):
    tracker = Tracker(tmp_path, config(database, "locked"))
    with pytest.raises(TrackingError, match="in use"):
        replay(tmp_path)
    with pytest.raises(TrackingError, match="in use"):
        Tracker(tmp_path, config(database, "locked"), resume=True)
    tracker.close("FINISHED")
    with pytest.raises(TrackingError, match="already holds a run"):
        Tracker(tmp_path, config(database, "locked"))
    with pytest.raises(TrackingError, match="not the tracking state"):
        replay(tmp_path / "nothing")


def test_an_artifact_must_be_a_file_of_the_run_folder(tmp_path, database):
    tracker = Tracker(tmp_path / "run", config(database, "outside"))
    (tmp_path / "secret.txt").write_text("x")
    with pytest.raises(ValueError, match="must be in the run folder"):
        tracker.artifact(tmp_path / "run" / ".." / "secret.txt")
    with pytest.raises(FileNotFoundError):
        tracker.artifact(tmp_path / "run" / "missing")
    tracker.close("FINISHED")


@pytest.mark.parametrize(
    "uri",
    [
        "file:///tmp/mlruns",
        "mlruns",
        "ftp://host",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:////tmp",
        "http://",
        "http://h:x",
    ],
)
def test_a_uri_that_cannot_work_is_refused_with_a_fix(uri, tmp_path):
    with pytest.raises(ConfigError, match=r"tracking\.uri='.*use a SQLite file such as") as caught:
        Tracker(tmp_path / "run", config(uri, "x"))
    assert uri in str(caught.value) and not (tmp_path / "run").exists()


def test_a_password_in_the_uri_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        resolve_uri("https://me:hunter2@host:5000")
    assert "hunter2" not in str(caught.value)


def test_a_relative_sqlite_path_is_that_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///sub/mlflow.db") == f"sqlite:///{tmp_path}/sub/mlflow.db"
    assert resolve_uri("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"


def test_system_metrics_are_plain_positive_numbers(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    values = system_metrics()
    assert set(values) == {"cpu_percent", "process_memory_mib", "memory_available_mib", "disk_free_mib"}
    assert 1 < values["process_memory_mib"] < 1e6 and 0 <= values["cpu_percent"] <= 100


def test_cpu_is_measured_since_the_last_call_from_whichever_thread(monkeypatch):
    asked = []
    monkeypatch.setattr(psutil, "cpu_percent", lambda: asked.append(threading.get_ident()) or 1.0)
    for _ in range(2):
        thread = threading.Thread(target=system_metrics)
        thread.start()
        thread.join()
    assert len(asked) == 2 and len(set(asked)) == 1


def test_system_metrics_are_of_the_disk_that_is_written_to(tmp_path, monkeypatch):
    sizes = {str(tmp_path): 7 << 20}
    monkeypatch.setattr(psutil, "disk_usage", lambda folder: types.SimpleNamespace(free=sizes[folder]))
    assert system_metrics(tmp_path)["disk_free_mib"] == 7.0


def test_system_metrics_read_the_gpu_only_where_cuda_is_in_use(monkeypatch):
    used = {"initialized": False}
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: used["initialized"],
        mem_get_info=lambda: (3 << 20, 10 << 20),
        memory_allocated=lambda: 5 << 20,
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert "gpu_memory_used_mib" not in system_metrics()
    used["initialized"] = True
    values = system_metrics()
    assert (values["gpu_memory_used_mib"], values["process_gpu_memory_mib"]) == (7.0, 5.0)


# ---------------------------------------------------------------------------------------------- a server that fails


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The URI of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def server(tmp_path: Path, database: str) -> Iterator[MLflow]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = MLflow(folder)
    yield server
    server.kill()


def test_a_server_that_never_answers_neither_slows_the_run_nor_its_end(tmp_path, black_hole):
    started = time.monotonic()
    tracker = Tracker(tmp_path, config(black_hole, "hole", tracking={"close_seconds": 1}))
    for step in range(1000):
        tracker.metrics({"loss": float(step)}, step)
    tracker.table("samples", [{"text": "z"}], 0)
    tracker.close("FINISHED")
    assert time.monotonic() - started < 20, "one request alone hangs for 30 s"
    assert tracker.lag() == 1003, "params, metrics, a table and the status"


def test_nothing_is_lost_when_the_server_is_down_comes_up_dies_and_returns(tmp_path, server, caplog):
    early, late = tmp_path / "early", tmp_path / "late"
    down = Tracker(early, config(server.uri, "early", tracking={"close_seconds": 1}))
    for step in range(20):
        down.metrics({"loss": float(step)}, step)
    down.table("samples", [{"text": "z"}], 0)
    down.dataset("prompts", [{"id": "a", "text": "one"}], 1, "d1")
    with caplog.at_level(logging.WARNING):
        down.close("FINISHED")
    assert down.lag() == 25 and f"python -m system.tracking {early}" in caplog.text

    tracker = Tracker(late, config(server.uri, "late"))  # it begins before the server does
    tracker.metrics({"loss": 0.0, "nan": float("nan"), "inf": float("inf")}, 0)
    server.start()
    wait_until(lambda: tracker.lag() == 0)
    server.kill()
    tracker.metrics({"loss": 1.0}, 1)
    tracker.table("samples", [{"text": "y"}], 1)
    server.start()
    tracker.metrics({"loss": 2.0}, 2)
    tracker.close("FINISHED")
    assert (tracker.lag(), refused(late)) == (0, 0)
    run = recorded(server.uri, "late")
    assert history(server.uri, run, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)] and run.info.status == "FINISHED"
    assert run.data.metrics["nan"] != run.data.metrics["nan"] and run.data.metrics["inf"] == sys.float_info.max

    assert replay(early) == 0
    run, client = recorded(server.uri, "early"), MlflowClient(server.uri)
    assert history(server.uri, run, "loss") == [(step, float(step)) for step in range(20)]
    assert run.data.params["learner.lr"] == "0.001" and len(datasets(run)) == 1
    table = client.download_artifacts(run.info.run_id, "tables/samples/000000.json", str(tmp_path))
    assert json.loads(Path(table).read_text()) == {"columns": ["text"], "data": [["z"]]}


def test_a_whole_journal_can_be_sent_to_another_server(tmp_path, database, black_hole):
    tracker = Tracker(tmp_path, config(black_hole, "moved", tracking={"close_seconds": 0}))
    tracker.metrics({"loss": 1.0}, 0)
    tracker.close("FINISHED")
    assert replay(tmp_path, database) == 0
    assert recorded(database, "moved").data.metrics == {"loss": 1.0}


def test_a_run_that_moves_takes_along_what_the_first_place_had(tmp_path, database):
    for number, place in enumerate(("before", "after")):
        tracker = Tracker(tmp_path, config(database, place), resume=number > 0)
        tracker.metrics({"loss": float(number)}, number)
        tracker.close("FINISHED")
    run = recorded(database, "after")
    assert history(database, run, "loss") == [(0, 0.0), (1, 1.0)]
    assert run.data.params["learner.lr"] == "0.001"


def test_what_a_power_loss_took_from_the_journal_hides_nothing_that_follows(tmp_path, database):
    tracker = Tracker(tmp_path, config(database, "power"))
    for step in range(20):
        tracker.metrics({"loss": 0.0}, step)
    tracker.close("FAILED")
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    tracker = Tracker(tmp_path, config(database, "power"), resume=True)
    tracker.metrics({"loss": 1.0}, 20)
    tracker.close("FINISHED")
    assert tracker.lag() == 0
    assert (20, 1.0) in history(database, recorded(database, "power"), "loss")
