"""Python functions that a config names by their import path."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from system.section import ConfigError


@functools.cache
def import_function(path: str, field: str) -> Callable[..., Any]:
    """The function at `package.module:function`. Raises ConfigError, naming the config's field, if there is none, or it cannot
    be called as each is: with a prompt, a text and its tokens."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    # A border: a module of the user's may raise anything while it is imported, a SyntaxError or a NameError say.
    except Exception as error:
        raise ConfigError(f"{field}={path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ConfigError(f"{field}={path!r} is a {type(function).__name__}, not a function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not every builtin has one
        return function
    try:
        signature.bind(None, "", [])
    except TypeError as error:
        raise ConfigError(
            f"{field}={path!r} cannot be called with (prompt, text, tokens), as it is {name}{signature} ({error}); write "
            f"def {name}(prompt, text, tokens)"
        ) from error
    return function


def check_module(path: str, field: str) -> None:
    """Raises ConfigError where there is no such module. Nothing of it is run, which may load a model or need a GPU."""
    module = path.partition(":")[0]
    try:
        found = importlib.util.find_spec(module) is not None
    # The packages above it are imported.
    except Exception as error:
        raise ConfigError(f"{field}={path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not found:
        raise ConfigError(
            f"{field}={path!r}: there is no module {module!r}; put its file into the folder where the command is started"
        )
