"""A function of the user's in a process of its own: a call that hangs is ended, and a crash harms nobody else.

A thread could not do this: native code, such as a regular expression that backtracks, holds the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import queue
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from system.functions import import_function
from system.section import ConfigError

START_SECONDS = 120.0
"""Longest wait until the function is imported, where nothing else is said."""
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class FunctionFault(RuntimeError):
    """A call gave no value: the function raised, took too long, or ended its process. The message says which."""


class FunctionProcess:
    """The function at `path` as a callable. Not thread-safe. The process is started anew when it has ended."""

    def __init__(self, path: str, field: str, seconds: float, start_seconds: float = START_SECONDS) -> None:
        """`seconds` bounds each call, `start_seconds` the import; `field` is the config's, for messages."""
        self.path, self.field, self.seconds, self.start_seconds = path, field, seconds, start_seconds
        self.__qualname__ = path.partition(":")[2]
        self._end: Callable[[], Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Raises FunctionFault if there is no value, ConfigError if the function cannot be imported."""
        if self._end is None or self._process.poll() is not None:
            self.start()
        try:
            self._connection.send(arguments)
            answered = self._connection.poll(self.seconds)
            known, value = self._connection.recv() if answered else (False, f"no answer after {self.seconds:g} s")
        except (EOFError, OSError):
            answered = False
            known, value = False, f"its process ended with exit code {self._process.wait()}"
        if not answered:
            self.close()
        if not known:
            raise FunctionFault(value)
        return value

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._end is not None:
            self._end()
            self._end = None

    def start(self) -> None:
        """Starts the process, by which it is known that the function can be had. Raises ConfigError if it cannot."""
        self.spawn()
        self.wait_until_imported()

    def spawn(self) -> None:
        """Starts the process and does not wait for it."""
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "system.function_process", self.path, self.field, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # What this process imports from, whoever set that up: a launcher, Ray or a test.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C is for the driver, which then ends everything in order
            )
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._process, self._connection)

    def wait_until_imported(self) -> None:
        """Raises ConfigError where the function cannot be had."""
        if not self._connection.poll(self.start_seconds):
            self.close()
            raise ConfigError(f"{self.field}={self.path!r} was not imported within {self.start_seconds:g} s")
        try:
            error = self._connection.recv()
        except EOFError:
            error = f"{self.field}={self.path!r}: its process ended with exit code {self._process.wait()} while importing it"
        if error:
            self.close()
            raise ConfigError(error)


class FunctionProcesses:
    """As many processes with the function at `path`, for as many callers at a time. Thread-safe."""

    def __init__(self, path: str, field: str, seconds: float, start_seconds: float, count: int) -> None:
        """Starts them. Raises ConfigError as `FunctionProcess.start`."""
        self.__qualname__ = path.partition(":")[2]
        self._idle: queue.SimpleQueue[FunctionProcess] = queue.SimpleQueue()
        processes = [FunctionProcess(path, field, seconds, start_seconds) for _ in range(count)]
        for process in processes:
            process.spawn()
        for process in processes:
            process.wait_until_imported()
            self._idle.put(process)

    def __call__(self, *arguments: Any) -> Any:
        """Raises as a FunctionProcess."""
        process = self._idle.get()
        try:
            return process(*arguments)
        finally:
            self._idle.put(process)


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    # With what the function started and did not end: a compiler that hangs, say.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def function_process(path: str, field: str, seconds: float) -> FunctionProcess:
    """One for each function in this process."""
    return FunctionProcess(path, field, seconds)


def _serve(path: str, field: str, connection: Connection) -> None:
    # A call that hangs would outlive its caller. The kernel goes by the thread that started this process, not by its process.
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    try:
        function = import_function(path, field)
    # A border: whatever importing the user's module raises is for the caller.
    except BaseException as error:
        connection.send(str(error) if isinstance(error, ConfigError) else f"{field}={path!r} cannot be imported: {error!r}")
        return
    connection.send("")
    while True:
        arguments = connection.recv()
        try:
            connection.send((True, function(*arguments)))
        # A border: whatever the user's function raises, sys.exit included, is for the caller.
        except BaseException as error:
            connection.send((False, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):  # the caller has no more calls
        _serve(sys.argv[1], sys.argv[2], Connection(int(sys.argv[3])))
