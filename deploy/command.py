"""What every command has: errors whose message says what to do end it without a traceback, and logs on standard error."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable

from system.config import ConfigError
from system.run_error import RunError

FAILED, REFUSED = 1, 2
"""Exit statuses: of what went wrong, and of what the user asked for and cannot be."""
LESS_MEMORY = (
    "To need less: in the learner lower learner.token_budget, sampler.samples_per_prompt or task.max_tokens, set "
    "learner.gradient_checkpointing=true, lora.layers below 1 or learner.dtype=bfloat16; in what scores lower "
    "sampler.token_budget or set sampler.reward_dtype=bfloat16; sampler.gpu_memory_utilization is the engine's share"
)


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """`main` takes the command's arguments and returns its exit status."""

    @functools.wraps(main)
    def run(argv: list[str]) -> int:
        # A function that a config names is found where the command is started, here as in Ray's workers.
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)
        try:
            return main(argv)
        except ConfigError as error:
            print(f"config error: {plain(error)}", file=sys.stderr)
            return REFUSED
        # A FloatingPointError is a loss without a value.
        except (RunError, FloatingPointError) as error:
            print(f"error: {plain(error)}", file=sys.stderr)
            return FAILED
        except Exception as error:
            cause = plain(error)
            # torch's, which is not imported for a name.
            if type(cause).__name__ != "OutOfMemoryError":
                raise
            print(f"error: {next(iter(str(cause).splitlines()), cause)} {LESS_MEMORY}", file=sys.stderr)
            return FAILED

    return run


def log_to_stderr() -> None:
    """From INFO on, with the time."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def plain(error: Exception) -> Exception:
    """Without the actor's traceback, which an error of an actor has in its message."""
    return getattr(error, "cause", error)
