"""A local journal and its courier: what a run logs is on disk first, and reaches a receiver when that can be had.

The receiver (`system/mlflow_run.py` is the one for MLflow) may be down, slow or lose acknowledgements. The courier moves
a cursor on disk only once an entry is settled, so delivery is at least once, and receivers make repetitions harmless.
A killed process loses nothing that was logged. A machine that loses power may lose the last seconds: there is no fsync.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from system.run_error import RunError
from system.whole_file import replace_text

log = logging.getLogger(__name__)

Entry = dict[str, Any]

BATCH = 1000
"""Most values in a batch of entries."""
# Files have a cursor of their own: an artifact store that fails does not hold up the metrics.
_LANE = dict.fromkeys(("params", "tags", "metrics", "dataset", "status"), "records") | {"artifact": "files", "model": "files"}


class TrackingError(RunError):
    """A run folder that cannot be tracked or replayed. The message says why and what to do."""


@dataclass
class State:
    """What tracking.json holds: which run this is at the receiver, and how much of the journal it has."""

    uri: str
    experiment: str
    name: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: int = field(default_factory=lambda: int(time.time() * 1000))
    run_id: str | None = None
    cursors: dict[str, int] = field(default_factory=lambda: {"records": 0, "files": 0})
    """Bytes of the journal that are settled: acknowledged, or refused for good."""
    sweep: str | None = None
    """Name of the parent run."""
    tables: list[str] = field(default_factory=list)
    """Artifacts that the MLflow UI shows as tables."""
    resumed: dict[str, str] = field(default_factory=dict)
    """Params whose value is another one since the run was resumed."""
    refused: int = 0
    unreadable: int = 0
    """Lines of the journal that a kill cut short."""

    @classmethod
    def load(cls, path: Path) -> State:
        """Raises TrackingError where there is none, or it is damaged."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TrackingError(f"{path} is not the tracking state of a run: {error}") from error

    def save(self, path: Path) -> None:
        replace_text(path, json.dumps(asdict(self), indent=2))

    def move(self, uri: str, experiment: str) -> None:
        """Another server or experiment has nothing of the journal yet: it gets all of it, as a new run."""
        if (uri, experiment) != (self.uri, self.experiment):
            self.uri, self.experiment, self.run_id = uri, experiment, None
            self.cursors = dict.fromkeys(self.cursors, 0)
            self.tables, self.refused, self.unreadable = [], 0, 0


def read(path: Path, offset: int = 0) -> Iterator[tuple[Entry, int]]:
    """As `Journal.read`, also while another process or object writes."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield json.loads(line), offset
            except ValueError:  # cut short by a kill: tolerated, and counted by the courier
                yield {"kind": "unreadable"}, offset


class Journal:
    """Append-only JSON lines, with one writer at a time on the machine: the file is locked while it is open.

    Raises:
        TrackingError: another process, or another object in this one, has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = 0
        """Entries that are not settled."""
        self._lock = threading.Lock()
        self._file = path.open("a+b", buffering=0)  # what could not be written must not wait for a later call
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise TrackingError(f"{path} is in use: the run is still going on, or is being replayed") from error
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")  # ends the line that a kill cut short, so that it spoils no other

    def append(self, kind: str, time_ms: int | None = None, **fields: Any) -> None:
        """Raises TypeError for what JSON cannot hold, ValueError once closed, and TrackingError where the disk is full."""
        entry = {"kind": kind, "time": int(time.time() * 1000) if time_ms is None else time_ms, **fields}
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._file.truncate(end)
                raise TrackingError(
                    f"{self.path} cannot be written: {error.strerror}; make room there, then --resume the run"
                ) from error
            self.waiting += 1

    def settle(self, entries: int) -> None:
        with self._lock:
            self.waiting -= entries

    def read(self, offset: int = 0) -> Iterator[tuple[Entry, int]]:
        """Whole lines from `offset` bytes on, each with the offset of its end."""
        return read(self.path, offset)

    def batches(self, offset: int) -> Iterator[tuple[str, list[Entry], int]]:
        """Neighbours of one kind, up to BATCH values, with the offset of their end. Kinds without values come singly."""
        kind, batch, size, end = "", [], 0, offset
        for entry, stop in self.read(offset):
            grows = len(entry["values"]) if "values" in entry else BATCH
            if batch and (entry["kind"] != kind or size + grows > BATCH):
                yield kind, batch, end
                batch, size = [], 0
            kind, size, end = entry["kind"], size + grows, stop
            batch.append(entry)
        if batch:
            yield kind, batch, end

    def close(self) -> None:
        with self._lock:
            self._file.close()


class Receiver(Protocol):
    """Where the journal goes. Both methods may raise, which is tried again later, and may be repeated."""

    def open(self) -> None:
        """Finds or creates the run, and sets the state's run_id."""
        ...

    def send(self, kind: str, entries: list[Entry], attempt: int) -> list[str]:
        """Takes entries of one kind, at the `attempt`-th try. Returns a reason for each item that it will never take."""
        ...


class Courier:
    """Hands the journal to the receiver. `deliver` belongs to one thread, `abandon` to any."""

    def __init__(self, journal: Journal, state: State, state_path: Path, connect: Callable[[], Receiver]) -> None:
        self.state = state
        self.abandoned = threading.Event()
        self._journal, self._path, self._connect = journal, state_path, connect
        self._receiver: Receiver | None = None
        self._failing = False
        self._attempts = dict.fromkeys(state.cursors, 0)
        self._saving = threading.Lock()
        self._save()
        size = journal.path.stat().st_size
        for lane, cursor in state.cursors.items():
            state.cursors[lane] = min(cursor, size)  # a power loss can take lines that had arrived
            entries = (entry for entry, _end in journal.read(state.cursors[lane]))
            journal.settle(-sum(_LANE.get(entry["kind"]) == lane for entry in entries))

    def deliver(self) -> bool:
        """One attempt at all that waits. True if it is settled; False, and a warning for each outage, if not."""
        if not self._journal.waiting:
            return True
        failures: list[Exception] = []
        # The border at which an unreachable, slow or broken receiver is tolerated: its entries wait, and are counted.
        try:
            receiver = self._receiver = self._receiver or self._connect()
            receiver.open()
            self._save()
            for lane in self.state.cursors:
                try:
                    self._drain(lane, receiver)
                except Exception as error:
                    failures.append(error)
        except Exception as error:
            failures.append(error)
        if failures and not self._failing and not self.abandoned.is_set():
            message = "%s does not take what is logged (%s); %d entries wait in %s"
            log.warning(message, self.state.uri, brief(failures[0]), self._journal.waiting, self._journal.path)
        elif self._failing and not failures:
            log.info("%s has caught up with %s", self.state.uri, self._journal.path)
        self._failing = bool(failures)
        return not failures

    def abandon(self) -> None:
        """From now on nothing is settled, even if a call that hangs should still succeed: others may have the journal."""
        with self._saving:
            self.abandoned.set()

    def _drain(self, lane: str, receiver: Receiver) -> None:
        state = self.state
        for kind, entries, end in self._journal.batches(state.cursors[lane]):
            if kind == "unreadable" and lane == "records":
                state.unreadable += len(entries)
                log.warning("%s: %d lines were cut short by a kill", self._journal.path, state.unreadable)
            if _LANE.get(kind) != lane:
                state.cursors[lane] = end
                continue
            self._attempts[lane] += 1
            reasons = receiver.send(kind, entries, self._attempts[lane])
            self._attempts[lane] = 0
            state.refused += len(reasons)
            state.cursors[lane] = end
            self._save()
            self._journal.settle(len(entries))
            if reasons:
                log.warning("refused for good: %d %s, %d in this run; first: %s", len(reasons), kind, state.refused, reasons[0])

    def _save(self) -> None:
        with self._saving:
            if self.abandoned.is_set():
                raise TrackingError("the journal was given up")
            self.state.save(self._path)


def brief(error: Exception) -> str:
    """Type and message, short enough for a log line."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:300]
