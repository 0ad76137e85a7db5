"""Servers that tests start, kill and start again: each a process with children of its own, on a free port of loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

START_SECONDS = 60
MLFLOW = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """What a command starts. `settings` are those of Popen."""

    def __init__(self, command: list[str], log: Path, answers: Callable[[], bool], **settings: Any) -> None:
        self._command, self._log, self._answers, self._settings = command, log, answers, settings
        self._process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True, **self._settings)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.05)

    def kill(self) -> None:
        """With SIGKILL; nothing where it does not run."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class MLflow(Server):
    """An MLflow server that keeps its port and its data, a database file."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
        super().__init__(command, folder / "server.log", self._is_there, cwd=folder, env=os.environ | MLFLOW)

    def _is_there(self) -> bool:
        try:
            return bool(MlflowClient(self.uri).search_experiments())
        except Exception:  # not up yet: asked again until it is, or the wait is over
            return False
