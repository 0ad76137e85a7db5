"""What ends a run that cannot go on."""

from __future__ import annotations


class RunError(RuntimeError):
    """The run ends: the message says why, and what to change before it is resumed."""
