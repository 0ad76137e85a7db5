"""MLflow behind a local journal, so that a tracking server can neither stop nor slow a run.

Every call writes to the run folder and returns. A background thread hands the journal to MLflow and moves a cursor on
disk once MLflow has acknowledged. What MLflow did not take stays in the journal, for the same run when it is resumed,
or for `python -m system.tracking RUN_DIR`.

Delivery is at least once, because an acknowledgement can get lost; each repetition is harmless. MLflow keeps one point
for equal (name, step, time, value), and the time is the journal's. A param repeats its value, a tag and an artifact
overwrite themselves, a dataset is found by its digest, and the run itself by a tag that holds the journal's key.

A killed process loses nothing that was logged. A machine that loses power may lose the last seconds: there is no fsync.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import psutil

from system.config import Config, ConfigError, flatten

log = logging.getLogger(__name__)

Entry = dict[str, Any]

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the journal retries
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_KEY_TAG = "headwater.journal"
_TABLES_TAG = "mlflow.loggedArtifacts"  # the MLflow UI shows the files listed here as tables
_BATCH_LIMIT = {"metrics": 1000, "params": 100, "tags": 100}
_NAME_LIMIT, _PARAM_LIMIT, _TAG_LIMIT = 250, 6000, 8000
# Files have a cursor of their own: an artifact store that fails does not hold up the metrics.
_LANE = {kind: "records" for kind in (*_BATCH_LIMIT, "dataset", "status")} | {"artifact": "files"}


class TrackingError(RuntimeError):
    """A run folder that cannot be tracked or replayed. The message says why and what to do."""


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


@dataclass
class _State:
    """What tracking.json holds: which MLflow run this is, and how much of the journal it has."""

    uri: str
    experiment: str
    name: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: int = field(default_factory=lambda: int(time.time() * 1000))
    run_id: str | None = None
    cursors: dict[str, int] = field(default_factory=lambda: {"records": 0, "files": 0})
    """Bytes of the journal that are settled: acknowledged, or refused for good."""
    tables: list[str] = field(default_factory=list)
    refused: int = 0
    unreadable: int = 0
    """Lines of the journal that a kill cut short."""

    @classmethod
    def load(cls, path: Path) -> _State:
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TrackingError(f"{path} is not the tracking state of a run: {error}") from error

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        part.replace(path)

    def move(self, uri: str, experiment: str) -> None:
        """Another server or experiment has nothing of the journal yet: it gets all of it, as a new run."""
        if (uri, experiment) != (self.uri, self.experiment):
            self.uri, self.experiment, self.run_id = uri, experiment, None
            self.cursors = dict.fromkeys(self.cursors, 0)
            self.tables, self.refused, self.unreadable = [], 0, 0


class _Journal:
    """Append-only JSON lines, with one writer at a time on the machine: the file is locked while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = 0
        self._lock = threading.Lock()
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise TrackingError(f"{path} is in use: the run is still going on, or is being replayed") from error
        if self._file.tell() and path.read_bytes()[-1:] != b"\n":
            self._file.write(b"\n")  # ends the line that a kill cut short, so that it spoils no other

    def append(self, entry: Entry) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            self.waiting += 1

    def settle(self, entries: int) -> None:
        with self._lock:
            self.waiting -= entries

    def read(self, offset: int) -> Iterator[tuple[Entry, int]]:
        """Whole lines from `offset` bytes on, each with the offset of its end."""
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    yield json.loads(line), offset
                except ValueError:  # cut short by a kill: tolerated, and counted by the reader
                    yield {"kind": "unreadable"}, offset

    def batches(self, offset: int) -> Iterator[tuple[str, list[Entry], int]]:
        """Neighbours of one kind, up to a batch's worth of values. Kinds without values come one by one."""
        kind, batch, size, end = "", [], 0, offset
        for entry, stop in self.read(offset):
            grows = len(entry["values"]) if "values" in entry else _BATCH_LIMIT["metrics"]
            if batch and (entry["kind"] != kind or size + grows > _BATCH_LIMIT["metrics"]):
                yield kind, batch, end
                batch, size = [], 0
            kind, size, end = entry["kind"], size + grows, stop
            batch.append(entry)
        if batch:
            yield kind, batch, end

    def close(self) -> None:
        with self._lock:
            self._file.close()


def _name(text: str) -> str:
    """As near to `text` as MLflow takes: letters, digits, `_-. ` and a relative path without `.` and `..`."""
    parts = re.sub(r"[^\w.\- /]", "_", text).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts if part)[:_NAME_LIMIT].rstrip("/") or "_"


def _refused(error: Exception) -> bool:
    """MLflow will never take this. Anything else, such as no answer, no login or no such run, can still be mended."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in (400, 413) or getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def _offer(items: list[Any], call: Callable[[list[Any]], Any]) -> list[str]:
    """Sends what MLflow takes of `items`; returns the reason for each that it refuses. Other errors propagate."""
    try:
        call(items)
    except Exception as error:
        if not _refused(error):
            raise
        if len(items) == 1:
            return [_shorten(error)]
        half = len(items) // 2
        return _offer(items[:half], call) + _offer(items[half:], call)
    return []


def _shorten(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:300]


class _Run:
    """The run at MLflow. Every method may raise, and may be repeated."""

    def __init__(self, state: _State, run_dir: Path) -> None:
        from mlflow import MlflowClient  # takes seconds, hence here, in the background

        self._client = MlflowClient(tracking_uri=state.uri)
        self._state = state
        self._run_dir = run_dir

    def open(self) -> None:
        """Finds the run, or creates it. Raises TrackingError if it was deleted at MLflow."""
        state = self._state
        if state.run_id is None:
            experiment = self._client.get_experiment_by_name(state.experiment)
            where = experiment.experiment_id if experiment else self._create_experiment()
            found = self._client.search_runs([where], f"tags.`{_KEY_TAG}` = '{state.key}'", max_results=1)
            tags = {_KEY_TAG: state.key}
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

    def send(self, kind: str, entries: list[Entry]) -> list[str]:
        """Hands over entries of one kind. Returns the reasons for what MLflow refuses for good."""
        if kind == "artifact":
            return [reason for entry in entries for reason in self._artifact(entry)]
        if kind not in _BATCH_LIMIT:
            call = self._dataset if kind == "dataset" else self._status
            return _offer(entries, lambda part: [call(entry) for entry in part])
        items, limit = list(self._items(kind, entries)), _BATCH_LIMIT[kind]
        chunks = [items[start : start + limit] for start in range(0, len(items), limit)]
        return [reason for chunk in chunks for reason in _offer(chunk, lambda part: self._log(kind, part))]

    def _log(self, kind: str, items: list[Any]) -> None:
        self._client.log_batch(self.id, **{kind: items})

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

    def _artifact(self, entry: Entry) -> list[str]:
        path = self._run_dir / entry["path"]
        if not path.exists():
            return [f"{path} was gone when its turn came"]
        reasons = []
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                folder = PurePosixPath(entry["folder"], file.parent.relative_to(path) if file != path else "").as_posix()
                reasons += _offer([str(file)], self._uploader(None if folder == "." else folder))
        if entry.get("table") and not reasons:
            tables = [known for known in self._state.tables if known != entry["path"]] + [entry["path"]]
            while len(value := json.dumps([{"path": table, "type": "table"} for table in tables])) > _TAG_LIMIT:
                tables.pop(0)  # stays an artifact, but is shown as plain JSON
            self._client.set_tag(self.id, _TABLES_TAG, value)
            self._state.tables = tables
        return reasons

    def _uploader(self, folder: str | None) -> Callable[[list[str]], Any]:
        return lambda files: [self._client.log_artifact(self.id, file, folder) for file in files]
