"""Ctrl-C, SIGTERM and a terminal that hangs up, as a request that the loop looks at or as an end at once."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator

logger = logging.getLogger("headwater")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_SECONDS = 3.0
"""A signal so soon after another is the same request: a terminal, a sweep and Ray's job manager may each pass it on."""


def heard() -> list[signal.Signals]:
    """SIGNALS, without a SIGHUP that nohup has ignored."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


class Stop:
    """What a signal does. The first one while the loop is `patient` asks it to end with a checkpoint; a second one, or one at
    any other time, raises KeyboardInterrupt. Calling the object says whether a stop was asked for."""

    def __init__(self) -> None:
        self._asked: float | None = None
        self._patient = False
        self._terminals: list[int] = []

    def __call__(self) -> bool:
        return self._asked is not None

    def hear(self) -> None:
        """From now on signals come here."""
        # Asked now: one that is gone is none any more.
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        for number in heard():
            signal.signal(number, self._heard)

    @contextlib.contextmanager
    def patient(self, patient: bool = True) -> Iterator[None]:
        """Inside, a signal is a request; with False, an end at once."""
        before, self._patient = self._patient, patient
        try:
            yield
        finally:
            self._patient = before

    def _heard(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            self._leave_the_terminal()
        now = time.monotonic()
        # Also of one that ends the run at once: what then ends in order must not be cut short by it.
        if self._asked is not None and now - self._asked <= AGAIN_SECONDS:
            return
        first, self._asked = self._asked is None, now
        if not (first and self._patient):
            raise KeyboardInterrupt(signal.Signals(number).name)
        logger.warning("stopping after this update, with a checkpoint; once more stops at once")

    def _leave_the_terminal(self) -> None:
        """What is written to one that is gone is an error, which would end a run that is to end in order."""
        for stream in self._terminals:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), stream)
