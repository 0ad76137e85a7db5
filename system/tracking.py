"""MLflow behind a local journal, so that a tracking server can neither stop nor slow a run.

Every call writes to the run folder and returns; a background thread hands the journal to MLflow. What MLflow did not
take stays in the journal, for the same run when it is resumed, or for `python -m system.tracking RUN_DIR`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from system.config import Config, ConfigError
from system.config_file import flatten
from system.journal import Courier, Journal, State, TrackingError
from system.mlflow_run import MlflowRun, plain_name
from system.tracking_uri import resolve_uri, set_environment

log = logging.getLogger(__name__)

REPLAY_ATTEMPTS = 3


class Tracker:
    """Records one run. Every call writes to the run folder and returns, whatever the server does. Thread-safe."""

    def __init__(self, run_dir: Path, config: Config, resume: bool = False, amend: bool = False) -> None:
        """Opens run_dir/journal.jsonl and run_dir/tracking.json, and logs the config as params.

        With `resume` the same MLflow run goes on, if there was one. A param never changes at MLflow, so a value that
        differs from the first one becomes the tag `resumed.NAME`. Another uri or experiment gets the whole journal.
        With `amend` a run that has ended gets more, and keeps the end that it had.

        Raises:
            ConfigError: tracking.uri cannot be used.
            TrackingError: the folder holds another run, or its journal is in use.
        """
        settings = config.tracking
        uri = resolve_uri(settings.uri)
        run_dir.mkdir(parents=True, exist_ok=True)
        known = (run_dir / "tracking.json").exists()
        if known and not (resume or amend):
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
        self._amends = known and amend
        if not self._amends:
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

    def dataset(self, name: str, rows: list[dict[str, Any]], count: int, digest: str) -> None:
        """What the run learns from, such as prompts with `id` and `text`: an input of the run, and a table. `count` and
        `digest` are of all of it; `rows`, what the table shows, may be less."""
        path = f"datasets/{plain_name(name)}.json"
        self._write_table(path, rows)
        columns = [{"name": column, "type": _type(value), "required": True} for column, value in (rows or [{}])[0].items()]
        self._journal.append("dataset", name=name[:500], digest=digest, rows=count, columns=columns, path=path)
        self._log_table(path)

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Rows as tables/NAME/STEP.json, in the format of MLflow's tables. A value that is not finite becomes null."""
        path = f"tables/{plain_name(name)}/{step:06d}.json"
        self._write_table(path, rows)
        self._log_table(path)

    def _log_table(self, path: str) -> None:
        self._journal.append("artifact", path=path, folder=PurePosixPath(path).parent.as_posix(), table=True)

    def _write_table(self, path: str, rows: list[dict[str, Any]]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = json.dumps({"columns": columns, "data": [[_plain(row.get(column)) for column in columns] for row in rows]})
        (self._dir / path).parent.mkdir(parents=True, exist_ok=True)
        (self._dir / path).write_text(text, encoding="utf-8")

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

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Ends the run at MLflow, unless it was amended. Waits tracking.close_seconds at most; what then still waits stays in
        the journal."""
        if self._closing.is_set():
            return
        try:
            if not self._amends:
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
        elif run_id := self._courier.state.run_id:
            log.info("in MLflow at %s it is run %s", self._courier.state.uri, run_id)
        self._journal.close()

    def _deliver(self) -> None:
        while not self._courier.abandoned.is_set():
            closing = self._closing.is_set()  # read first: an attempt that begins after close() sees all entries
            if self._courier.deliver() and closing:
                return
            (self._courier.abandoned if closing else self._closing).wait(self._flush_seconds)


def _courier(run_dir: Path, journal: Journal, state: State) -> Courier:
    set_environment()
    return Courier(journal, state, run_dir / "tracking.json", lambda: MlflowRun(state, run_dir))


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
        # An item that MLflow never answers is given up from the third attempt on, and lets the rest through.
        any(courier.deliver() for _ in range(REPLAY_ATTEMPTS))
        return journal.waiting
    finally:
        journal.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m system.tracking", description="Send a run's journal to MLflow.")
    parser.add_argument("run_dir", type=Path, help="the folder of a run that has ended, or its name under runs/")
    parser.add_argument("--uri", help="send all of it to this server or SQLite file instead")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    given = arguments.run_dir
    folder = next((path for path in (given, "runs" / given) if (path / "tracking.json").is_file()), given)
    try:
        waiting = replay(folder, arguments.uri)
    except (ConfigError, TrackingError) as error:
        sys.exit(str(error))
    if waiting:
        sys.exit(f"{waiting} entries still wait in {folder}")
    refused = State.load(folder / "tracking.json").refused
    print(f"MLflow has all of {folder}{f', but for {refused} that it refused' if refused else ''}")


if __name__ == "__main__":
    main()
