"""MLflow behind a local journal, so that a tracking server can neither stop nor slow a run.

Every call writes to the run folder and returns; a background thread hands the journal to MLflow. What MLflow did not
take stays in the journal, for the same run when it is resumed, or for `python -m system.tracking RUN_DIR`.

Something whose acknowledgement was lost is sent again, which is harmless: MLflow keeps one point for equal (name, step,
time, value), and the time is the journal's. A param repeats its value, a tag and an artifact overwrite themselves, a
dataset is found by its digest, a model version by its run, and the run itself by a tag that holds the journal's key.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import psutil

from system.config import Config, ConfigError
from system.config_file import flatten
from system.journal import BATCH, Courier, Entry, Journal, State, TrackingError, first_line

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the courier retries
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_KEY_TAG = "headwater.journal"
_SWEEP_TAG, _PARENT_TAG = "headwater.sweep", "mlflow.parentRunId"  # of a parent run, and of its children
_TABLES_TAG = "mlflow.loggedArtifacts"  # the MLflow UI shows the files listed here as tables
_BATCH_LIMIT = {"metrics": BATCH, "params": 100, "tags": 100}
_NAME_LIMIT, _PARAM_LIMIT, _TAG_LIMIT = 250, 6000, 8000
_MIB = 1 << 20


def resolve_uri(uri: str) -> str:
    """The URI with an absolute path, so that a replay from another folder finds the same file.

    Raises:
        ConfigError: neither a SQLite file nor a server, or one with a password in it.
    """
    fix = "use a SQLite file such as 'sqlite:///mlflow.db' or a server such as 'http://127.0.0.1:5000'"
    scheme, _, rest = uri.partition("://")
    if scheme == "sqlite":
        path = Path(rest[1:])
        if rest[:1] != "/" or not rest[1:] or ":memory:" in rest or path.is_dir():
            raise ConfigError(f"tracking.uri={uri!r}: names no file; {fix}")
        return f"sqlite:///{path.resolve()}"
    if scheme not in ("http", "https"):
        raise ConfigError(f"tracking.uri={uri!r}: a scheme that is not supported (MLflow refuses file stores); {fix}")
    try:
        parts = urlsplit(uri)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"tracking.uri={uri!r}: {error}; {fix}") from error
    if not host:
        raise ConfigError(f"tracking.uri={uri!r}: names no host; {fix}")
    if "@" in parts.netloc:
        shown = f"{scheme}://***@{parts.netloc.rpartition('@')[2]}"
        fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        raise ConfigError(f"tracking.uri={shown!r}: everybody who sees the run would read the password; {fix}")
    return uri.rstrip("/")


def _name(text: str) -> str:
    """As near to `text` as MLflow takes: letters, digits, `_-. ` and a relative path without `.` and `..`."""
    parts = re.sub(r"[^\w.\- /]", "_", text).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts if part)[:_NAME_LIMIT].rstrip("/") or "_"


def _refused(error: Exception) -> bool:
    """MLflow says that it will never take this. No answer, no login or no such run can still be mended."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in (400, 413) or getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def _passing(error: BaseException | None) -> bool:
    """No answer, or a busy server's: whatever was sent had no part in it."""
    from requests import RequestException

    if getattr(error, "error_code", None) in ("TEMPORARILY_UNAVAILABLE", "RESOURCE_EXHAUSTED", "REQUEST_LIMIT_EXCEEDED"):
        return True
    if isinstance(error, RequestException):
        return error.response is None or error.response.status_code in (429, 502, 503, 504)
    return error is not None and _passing(error.__cause__ or error.__context__)


class _Run:
    """The run at MLflow: the Receiver of the journal. Every method may raise, and may be repeated."""

    def __init__(self, state: State, run_dir: Path) -> None:
        from mlflow import MlflowClient  # takes seconds, hence here, in the background

        self._client = MlflowClient(tracking_uri=state.uri)
        self._state = state
        self._run_dir = run_dir
        self._probe: Callable[[], None] | None = None

    def open(self) -> None:
        """Finds the run, or creates it. Raises TrackingError if it was deleted at MLflow."""
        state = self._state
        if state.run_id is None:
            experiment = self._client.get_experiment_by_name(state.experiment)
            where = experiment.experiment_id if experiment else self._create_experiment()
            found = self._client.search_runs([where], f"tags.`{_KEY_TAG}` = '{state.key}'", max_results=1)
            tags = {_KEY_TAG: state.key}
            if state.sweep and not found:
                tags[_PARENT_TAG] = self._parent(where, state.sweep)
            run = found[0] if found else self._client.create_run(where, state.started, tags, state.name)
            state.run_id = run.info.run_id
        run = self._client.get_run(state.run_id)
        if run.info.lifecycle_stage != "active":
            raise TrackingError(f"run {state.run_id} was deleted at MLflow; restore it to receive the journal")
        self.id, self._artifacts = run.info.run_id, str(run.info.artifact_uri)

    def _create_experiment(self) -> str:
        location = None
        if self._state.uri.startswith("sqlite:"):  # beside the database, whatever the working directory is
            folder = Path(self._state.uri.removeprefix("sqlite:///")).parent / "mlruns"
            location = (folder / quote(self._state.experiment, safe="")).as_uri()
        return self._client.create_experiment(self._state.experiment, location)

    def _parent(self, experiment_id: str, sweep: str) -> str:
        """The parent run's id. Of parents that several children created at the same time the first one stays."""

        def parents() -> list[str]:
            found = self._client.search_runs([experiment_id], f"tags.`{_SWEEP_TAG}` = '{sweep}'", max_results=100)
            return [run.info.run_id for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))]

        if known := parents():
            return known[0]
        own = self._client.create_run(experiment_id, tags={_SWEEP_TAG: sweep}, run_name=sweep).info.run_id
        # It has nothing of its own to wait for.
        self._client.set_terminated(own, "FINISHED")
        first, *_ = parents()
        if first != own:
            self._client.delete_run(own)
        return first

    def send(self, kind: str, entries: list[Entry], attempt: int) -> list[str]:
        """Hands over entries of one kind. Returns the reasons for what MLflow refuses for good.

        From the third attempt on, an item that is answered with an error while others pass counts as refused, whatever the
        error says: MLflow also answers "internal error" to what its database cannot hold.
        """
        self._probe = None if attempt < 3 else self._write_file if kind in ("artifact", "model") else self._write_tag
        if kind == "artifact":
            return [reason for entry in entries for reason in self._artifact(entry)]
        if kind not in _BATCH_LIMIT:
            call = {"dataset": self._dataset, "status": self._status, "model": self._model_version}[kind]
            return self._offer(entries, lambda part: [call(entry) for entry in part])
        items, limit = list(self._items(kind, entries)), _BATCH_LIMIT[kind]
        chunks = [items[start : start + limit] for start in range(0, len(items), limit)]
        return [reason for chunk in chunks for reason in self._offer(chunk, lambda part: self._log(kind, part))]

    def _log(self, kind: str, items: list[Any]) -> None:
        batch: dict[str, Any] = {kind: items}
        self._client.log_batch(self.id, **batch)

    def _offer(self, items: list[Any], call: Callable[[list[Any]], Any]) -> list[str]:
        """Sends what MLflow takes of `items`; returns a reason for each that it refuses. Other errors propagate."""
        try:
            call(items)
        except Exception as error:
            if not _refused(error):
                if self._probe is None or _passing(error):
                    raise
                self._probe()  # raises if it is not the items that are at fault
            if len(items) == 1:
                return [first_line(error)]
            half = len(items) // 2
            return self._offer(items[:half], call) + self._offer(items[half:], call)
        return []

    def _write_tag(self) -> None:
        self._client.set_tag(self.id, "headwater.probe", str(time.time()))  # a new value: an old one writes nothing

    def _write_file(self) -> None:
        self._client.log_artifact(self.id, str(self._run_dir / "tracking.json"), "headwater.probe")

    @staticmethod
    def _items(kind: str, entries: list[Entry]) -> Iterator[Any]:
        from mlflow.entities import Metric, Param, RunTag

        for entry in entries:
            for name, value in entry["values"].items():
                if kind == "metrics":
                    yield Metric(_name(name), value, entry["time"], entry["step"])
                elif kind == "params":
                    yield Param(_name(name), str(value)[:_PARAM_LIMIT])
                else:
                    yield RunTag(_name(name), str(value)[:_TAG_LIMIT])

    def _status(self, entry: Entry) -> None:
        if entry["status"] == "RUNNING":
            self._client.update_run(self.id, "RUNNING")
        else:
            self._client.set_terminated(self.id, entry["status"], entry["time"])

    def _dataset(self, entry: Entry) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        scheme = urlsplit(self._artifacts).scheme
        dataset = Dataset(
            name=entry["name"],
            digest=entry["digest"],
            source_type="local" if scheme in ("", "file") else scheme,
            source=json.dumps({"uri": f"{self._artifacts}/{entry['path']}"}),
            schema=json.dumps({"mlflow_colspec": entry["columns"]}),
            profile=json.dumps({"num_rows": entry["rows"]}),
        )
        self._client.log_inputs(self.id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _model_version(self, entry: Entry) -> None:
        from mlflow.exceptions import MlflowException

        name = entry["name"]
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Versions of other models may be of this run too.
        if not any(version.name == name for version in self._client.search_model_versions(f"run_id = '{self.id}'")):
            self._client.create_model_version(name, f"{self._artifacts}/{entry['folder']}", self.id)

    def _artifact(self, entry: Entry) -> list[str]:
        path = self._run_dir / entry["path"]
        if not path.exists():
            return [f"{path} was gone when its turn came"]
        reasons = []
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                folder = PurePosixPath(entry["folder"], file.parent.relative_to(path) if file != path else "").as_posix()
                reasons += self._offer([str(file)], self._uploader(None if folder == "." else folder))
        if entry.get("table") and not reasons:
            tables = [known for known in self._state.tables if known != entry["path"]] + [entry["path"]]
            while len(value := json.dumps([{"path": table, "type": "table"} for table in tables])) > _TAG_LIMIT:
                tables.pop(0)  # stays an artifact, but is shown as plain JSON
            self._client.set_tag(self.id, _TABLES_TAG, value)
            self._state.tables = tables
        return reasons

    def _uploader(self, folder: str | None) -> Callable[[list[str]], Any]:
        return lambda files: [self._client.log_artifact(self.id, file, folder) for file in files]


class Tracker:
    """Records one run. Every call writes to the run folder and returns, whatever the server does. Thread-safe."""

    def __init__(self, run_dir: Path, config: Config, resume: bool = False) -> None:
        """Opens run_dir/journal.jsonl and run_dir/tracking.json, and logs the config as params.

        With `resume` the same MLflow run goes on, if there was one. A param never changes at MLflow, so a value that
        differs from the first one becomes the tag `resumed.NAME`. Another uri or experiment gets the whole journal.

        Raises:
            ConfigError: tracking.uri cannot be used.
            TrackingError: the folder holds another run, or its journal is in use.
        """
        settings = config.tracking
        uri = resolve_uri(settings.uri)
        run_dir.mkdir(parents=True, exist_ok=True)
        known = (run_dir / "tracking.json").exists()
        if known and not resume:
            raise TrackingError(f"{run_dir} already holds a run; resume it, or choose another folder")
        self._dir = run_dir.resolve()
        self._journal = Journal(run_dir / "journal.jsonl")
        state = (
            State.load(run_dir / "tracking.json")
            if known
            else State(uri, settings.experiment, config.name, sweep=settings.sweep)
        )
        state.move(uri, settings.experiment)
        self._courier = _courier(self._dir, self._journal, state)
        self._flush_seconds, self._close_seconds = settings.flush_seconds, settings.close_seconds
        self._log_config({name: str(value) for name, value in flatten(config).items()})
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def _log_config(self, params: dict[str, str]) -> None:
        first = next((entry["values"] for entry, _end in self._journal.read() if entry["kind"] == "params"), None)
        if first is None:
            self._journal.append("params", values=params)
            return
        self._journal.append("status", status="RUNNING")
        latest = first | self._courier.state.resumed
        changed = {name: value for name, value in params.items() if latest.get(name) != value}
        self._courier.state.resumed.update(changed)
        if changed:
            self.tags({f"resumed.{name}": value for name, value in changed.items()})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """MLflow shows NaN as such, and an infinity as the largest float64 of its sign."""
        self._journal.append("metrics", step=int(step), values={name: float(value) for name, value in values.items()})

    def system(self, node: str, values: Mapping[str, float], step: int) -> None:
        """The `system_metrics()` of a process, as `system/NODE/NAME`: MLflow has a page for these."""
        self.metrics({f"system/{node}/{name}": value for name, value in values.items()}, step)

    def tags(self, values: Mapping[str, str]) -> None:
        """Text about the run that may change, unlike a param."""
        self._journal.append("tags", values={name: str(value) for name, value in values.items()})

    def dataset(self, name: str, rows: list[dict[str, Any]]) -> None:
        """What the run learns from, such as prompts with `id` and `text`: an input of the run, and a table."""
        path = f"datasets/{_name(name)}.json"
        digest = self._write_table(path, rows)
        columns = [{"name": column, "type": _type(value), "required": True} for column, value in (rows or [{}])[0].items()]
        self._journal.append("dataset", name=name[:500], digest=digest, rows=len(rows), columns=columns, path=path)
        self._log_table(path)

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Rows as tables/NAME/STEP.json, in the format of MLflow's tables. A value that is not finite becomes null."""
        path = f"tables/{_name(name)}/{step:06d}.json"
        self._write_table(path, rows)
        self._log_table(path)

    def _log_table(self, path: str) -> None:
        self._journal.append("artifact", path=path, folder=PurePosixPath(path).parent.as_posix(), table=True)

    def _write_table(self, path: str, rows: list[dict[str, Any]]) -> str:
        """Returns a digest of the content."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = json.dumps({"columns": columns, "data": [[_plain(row.get(column)) for column in columns] for row in rows]})
        (self._dir / path).parent.mkdir(parents=True, exist_ok=True)
        (self._dir / path).write_text(text, encoding="utf-8")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or all files of a folder, that stays in the run folder until it is sent. `folder` is where it goes
        at MLflow: by default the top for a file, and a folder of the same name for a folder.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: it is outside the run folder, from which a later replay would read it.
        """
        whole = path.resolve(strict=True)
        if not whole.is_relative_to(self._dir):
            raise ValueError(f"artifact {path}: must be in the run folder {self._dir}, from which it is sent")
        default = whole.name if whole.is_dir() else ""
        self._journal.append("artifact", path=whole.relative_to(self._dir).as_posix(), folder=folder or default)

    def model_version(self, name: str, folder: str) -> None:
        """What `artifact` put into `folder` at MLflow as the next version of a registered model: one a run."""
        self._journal.append("model", name=name, folder=folder)

    def lag(self) -> int:
        """Entries that MLflow has not acknowledged."""
        return self._journal.waiting

    @property
    def refused(self) -> int:
        """Items that MLflow refused for good. The journal still has them."""
        return self._courier.state.refused

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Ends the run at MLflow. Waits tracking.close_seconds at most; what then still waits stays in the journal."""
        if self._closing.is_set():
            return
        try:
            self._journal.append("status", status=status)
        # Tolerated at the end: what stopped the run is the error to see, and a replay calls a run without an end KILLED.
        except TrackingError as error:
            log.warning("the run's end is not recorded: %s", error)
        self._closing.set()
        self._thread.join(self._close_seconds)
        self._courier.abandon()
        if self.lag():
            replay_it = f"python -m system.tracking {self._dir}"
            log.warning("%d entries did not reach %s; send them with: %s", self.lag(), self._courier.state.uri, replay_it)
        self._journal.close()

    def _deliver(self) -> None:
        while not self._courier.abandoned.is_set():
            closing = self._closing.is_set()  # read first: an attempt that begins after close() sees all entries
            if self._courier.deliver() and closing:
                return
            (self._courier.abandoned if closing else self._closing).wait(self._flush_seconds)


def _courier(run_dir: Path, journal: Journal, state: State) -> Courier:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return Courier(journal, state, run_dir / "tracking.json", lambda: _Run(state, run_dir))


def _type(value: Any) -> str:
    return {bool: "boolean", int: "long", float: "double"}.get(type(value), "string")


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replay(run_dir: Path, uri: str | None = None) -> int:
    """Sends what a run that has ended left in its journal; returns the number of entries that still wait.

    A run that never ended was killed, and is marked so. With `uri` the whole journal goes to another server.

    Raises:
        ConfigError: `uri` cannot be used.
        TrackingError: not a run folder, or the run is still going on.
    """
    run_dir = run_dir.resolve()
    state = State.load(run_dir / "tracking.json")
    journal = Journal(run_dir / "journal.jsonl")
    try:
        state = State.load(run_dir / "tracking.json")  # again: it may have moved on before the journal was free
        if uri is not None:
            state.move(resolve_uri(uri), state.experiment)
        courier = _courier(run_dir, journal, state)
        status, last = "RUNNING", state.started
        for entry, _end in journal.read():
            status, last = entry.get("status", status), entry.get("time", last)
        if status == "RUNNING":
            journal.append("status", last, status="KILLED")
        courier.deliver()
        return journal.waiting
    finally:
        journal.close()


def system_metrics() -> dict[str, float]:
    """Of this process and its machine. Sizes in MiB. CPU in percent of all cores since this thread
    last asked, so 0 at first.

    GPU memory is there if this process already uses CUDA: asking must not create a CUDA context.
    """
    values = {
        "cpu_percent": psutil.cpu_percent(),
        "process_memory_mib": psutil.Process().memory_info().rss / _MIB,
        "memory_available_mib": psutil.virtual_memory().available / _MIB,
        "disk_free_mib": psutil.disk_usage(".").free / _MIB,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        values["gpu_memory_used_mib"] = (total - free) / _MIB
        values["process_gpu_memory_mib"] = torch.cuda.memory_allocated() / _MIB
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m system.tracking", description="Send a run's journal to MLflow.")
    parser.add_argument("run_dir", type=Path, help="the folder of a run that has ended")
    parser.add_argument("--uri", help="send all of it to this server or SQLite file instead")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        waiting = replay(arguments.run_dir, arguments.uri)
    except (ConfigError, TrackingError) as error:
        sys.exit(str(error))
    if waiting:
        sys.exit(f"{waiting} entries still wait in {arguments.run_dir}")
    print(f"MLflow has all of {arguments.run_dir}")


if __name__ == "__main__":
    main()
