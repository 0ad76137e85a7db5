"""A run at MLflow, as the receiver of a journal: `system.tracking` writes the journal, `system.journal` brings it here.

Something whose acknowledgement was lost is sent again, which is harmless: MLflow keeps one point for equal (name, step,
time, value), and the time is the journal's. A param repeats its value, a tag and an artifact overwrite themselves, a
dataset is found by its digest, a model version by its run, and the run itself by a tag that holds the journal's key.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from system.journal import BATCH, Entry, State, TrackingError, brief

_KEY_TAG = "headwater.journal"
SWEEP_TAG, PARENT_TAG = "headwater.sweep", "mlflow.parentRunId"  # of a parent run, and of its children
_TABLES_TAG = "mlflow.loggedArtifacts"  # the MLflow UI shows the files listed here as tables
_BATCH_LIMIT = {"metrics": BATCH, "params": 100, "tags": 100}
_NAME_LIMIT, _PARAM_LIMIT, _TAG_LIMIT = 250, 6000, 8000


def plain_name(text: str) -> str:
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


class MlflowRun:
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
                tags[PARENT_TAG] = self._parent(where, state.sweep)
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
            found = self._client.search_runs([experiment_id], f"tags.`{SWEEP_TAG}` = '{sweep}'", max_results=100)
            return [run.info.run_id for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))]

        if known := parents():
            return known[0]
        own = self._client.create_run(experiment_id, tags={SWEEP_TAG: sweep}, run_name=sweep).info.run_id
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
                return [brief(error)]
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
                    yield Metric(plain_name(name), value, entry["time"], entry["step"])
                elif kind == "params":
                    yield Param(plain_name(name), str(value)[:_PARAM_LIMIT])
                else:
                    yield RunTag(plain_name(name), str(value)[:_TAG_LIMIT])

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
