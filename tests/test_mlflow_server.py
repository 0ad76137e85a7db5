"""The MLflow server of deploy/cluster/mlflow.yaml, started with its own arguments: it answers to its names alone, and a run is
whole in its database after the database was killed under it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import yaml
from mlflow import MlflowClient

from system.config_file import parse
from system.journal import State
from system.tracking import Tracker
from tests.servers import Server, free_port

pytestmark = pytest.mark.chaos
MANIFEST = list(yaml.safe_load_all((Path(__file__).resolve().parents[1] / "deploy/cluster/mlflow.yaml").read_text()))
PASSWORD = "a-password"


def container(kind: str) -> dict[str, Any]:
    """Of the only object of that kind."""
    (found,) = [document for document in MANIFEST if document["kind"] == kind]
    (only,) = found["spec"]["template"]["spec"]["containers"]
    return only


def status(port: int, host: str) -> int:
    """What the server says to one that calls it `host`; 0 while it is not there."""
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=10).status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except (urllib.error.URLError, TimeoutError):
        return 0


@contextlib.contextmanager
def server(folder: Path, database: str | None = None) -> Iterator[int]:
    """The port of the manifest's server. `database` is host and port of its database; without one it has a file."""
    given, port = container("Deployment"), free_port()
    arguments = dict(argument.split("=", 1) if "=" in argument else (argument, "") for argument in given["args"])
    uri = arguments["--backend-store-uri"].replace("$(DATABASE_PASSWORD)", PASSWORD)
    here = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--backend-store-uri": uri.replace("mlflow-database:5432", database) if database else f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination": str(folder / "artifacts"),
        "--allowed-hosts": f"{arguments['--allowed-hosts']},127.0.0.1:{port}",
    }
    assert set(here) <= set(arguments)
    command = [str(Path(sys.executable).parent / given["command"][0]), *given["command"][1:]]
    command += [f"{name}={value}" if value else name for name, value in (arguments | here).items()]
    environment = os.environ | {each["name"]: each["value"] for each in given["env"] if "value" in each}
    started = Server(command, folder / "server.txt", lambda: status(port, "mlflow:5000") != 0, env=environment)
    try:
        started.start()
        yield port
    finally:
        started.kill()


class PostgreSQL(Server):
    """A database as the manifest's pod makes it: its user, its database, a password."""

    def __init__(self, folder: Path) -> None:
        of_pod = {each["name"]: each.get("value") for each in container("StatefulSet")["env"]}
        self.user, self.name = str(of_pod["POSTGRES_USER"]), str(of_pod["POSTGRES_DB"])
        self.port, data, password = free_port(), folder / "data", folder / "password"
        data.mkdir()
        password.write_text(PASSWORD)
        settings: dict[str, Any] = {"cwd": data}
        if os.geteuid() == 0:  # as which it refuses to run
            settings |= {"user": "nobody", "extra_groups": []}
            for path in (folder, *folder.parents[:2]):
                path.chmod(0o755)
            shutil.chown(data, "nobody")
        command = ["initdb", "--pgdata", str(data), "--username", self.user, "--pwfile", str(password)]
        subprocess.run([*command, "--auth", "scram-sha-256"], check=True, capture_output=True, **settings)
        command = ["postgres", "-D", str(data), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        super().__init__([*command, "-c", "unix_socket_directories="], folder / "postgres.txt", self._is_there, **settings)

    def _is_there(self) -> bool:
        try:
            self.connect("postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    def connect(self, name: str) -> Any:
        return psycopg2.connect(host="127.0.0.1", port=self.port, user=self.user, password=PASSWORD, dbname=name)

    def create(self) -> None:
        with contextlib.closing(self.connect("postgres")) as connection:
            connection.autocommit = True
            connection.cursor().execute(f"CREATE DATABASE {self.name}")

    def count(self, table: str) -> int:
        with contextlib.closing(self.connect(self.name)) as connection, connection.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {table}")
            return cursor.fetchone()[0]


def test_the_server_answers_to_its_own_names_alone(tmp_path: Path) -> None:
    with server(tmp_path) as port:
        assert status(port, "mlflow:5000") == 200
        assert status(port, "elsewhere.example") == 403


@pytest.mark.skipif(shutil.which("initdb") is None, reason="this machine has no PostgreSQL")
def test_a_run_is_whole_in_a_database_that_was_killed_under_it(tmp_path: Path) -> None:
    database = PostgreSQL(tmp_path)
    with contextlib.ExitStack() as alive:
        alive.callback(database.kill)
        database.start()
        database.create()
        port = alive.enter_context(server(tmp_path, f"127.0.0.1:{database.port}"))
        uri = f"http://127.0.0.1:{port}"
        settings = {"uri": uri, "experiment": "on-postgresql", "flush_seconds": 0.1, "model": "numbers"}
        tracker = Tracker(tmp_path / "run", parse({"task": {"kind": "random_number"}, "tracking": settings}))
        adapter = tmp_path / "run/adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")

        def log(steps: range) -> None:
            for step in steps:
                tracker.metrics({"loss": float(step), "log_z": float("nan")}, step)

        log(range(20))
        while database.count("metrics") < 40:
            time.sleep(0.1)
        database.kill()
        log(range(20, 40))
        time.sleep(2.0)
        assert tracker.lag() > 0
        database.start()
        tracker.table("samples", [{"text": "z", "log_reward": -1.5}], 39)
        tracker.artifact(adapter)
        tracker.model_version("numbers", adapter.name)
        tracker.close("FINISHED")
        assert (tracker.lag(), State.load(tmp_path / "run" / "tracking.json").refused) == (0, 0)

        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("on-postgresql")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        points = client.get_metric_history(run.info.run_id, "loss")
        assert [(point.step, point.value) for point in points] == [(step, float(step)) for step in range(40)]
        assert run.info.status == "FINISHED" and run.data.params["task.kind"] == "random_number"
        (version,) = client.search_model_versions("name='numbers'")
        assert (version.version, version.run_id) == ("1", run.info.run_id)
        assert [file.path for file in client.list_artifacts(run.info.run_id, "adapter")] == ["adapter/adapter_config.json"]
        assert database.count("metrics") == 80
