"""What ends a run that cannot go on, and how an error reads in a line."""

from __future__ import annotations


class RunError(RuntimeError):
    """The run ends: the message says why, and what to change before it is resumed."""


def first_line(error: BaseException) -> str:
    """Of its message; its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
