"""What Ray's errors say: a call's own error, or the loss of whom it went to."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from system import run_error


def raised(error: BaseException) -> BaseException:
    """What a call raised in an actor, as its caller would have seen it there; any other error as it is."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.as_instanceof_cause()
    return error


def is_loss(error: BaseException) -> bool:
    """The actor is gone, or its node is, or the way to it."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def first_line(error: BaseException) -> str:
    """What went wrong, without what Ray puts in front of it: the traceback in an actor, or which actor died."""
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    if isinstance(cause, ActorDiedError):
        # The first line says that an actor died, the indented ones which it was, and only then comes why.
        for line in str(cause).splitlines()[1:]:
            if not line.startswith("\t"):
                return line.partition(" Some common causes")[0]
    return run_error.first_line(cause)
