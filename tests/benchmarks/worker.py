"""An object in a process of its own: vLLM allows one engine in each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

_object: Any


def _start(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _object
    _object = make(*arguments)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_object, method)(*arguments)


class Worker:
    """Calls methods of `make(*arguments)`, which is made and lives there."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _start, (make, arguments))

    def __call__(self, method: str, *arguments: Any) -> Any:
        return self._pool.submit(_call, method, *arguments).result()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
