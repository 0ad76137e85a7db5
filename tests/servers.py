"""Servers that tests start, kill and start again: each a process with children of its own, on a free port of loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

START_SECONDS = 60
MLFLOW = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(processes: Iterable[psutil.Process]) -> set[tuple[str, int]]:
    """The addresses and ports at which processes take connections."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile
            found += [each.laddr for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    return {(address.ip.removeprefix("::ffff:"), address.port) for address in found}


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


class Slow:
    """In front of a server: what it is asked arrives so many seconds late. Use as a context; `uri` is its own."""

    def __init__(self, uri: str, seconds: float) -> None:
        host, port = uri.removeprefix("http://").split(":")
        self._behind, self._seconds = (host, int(port)), seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked = 0

    def __enter__(self) -> Slow:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self.asked += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # A server that is down is one that ends the connection at once.
        with client, suppress(OSError), socket.create_connection(self._behind) as server:
            threading.Thread(target=self._pass, args=(server, client, 0.0), daemon=True).start()
            self._pass(client, server, self._seconds)

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, seconds: float) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(seconds)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


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
