"""The answers of several processes that work in step, as one answer: all of them, or the error that ended it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

GRACE_SECONDS = 2.0
"""Between an error and the end of all: the process that died is noticed later than the peers that lost it complain."""


def first_of_all(
    answers: Sequence[Future[Any]], shared: type[Exception], death: type[Exception], end: Callable[[], None]
) -> Future[Any]:
    """The first answer, once all are there.

    Args:
        shared: an error that all raise if one does: they stay in step, and it is passed on at once.
        death: the error of a process that is gone; it is passed on before what its peers say of it.
        end: ends all processes. Called after any other error, since the rest may wait for each other for ever.
    """
    whole: Future[Any] = Future()
    lock = threading.Lock()
    ending = False

    def give_up(error: BaseException) -> None:
        errors = [error, *(answer.exception() for answer in answers if answer.done())]
        end()
        whole.set_exception(next((each for each in errors if isinstance(each, death)), error))

    def take(answer: Future[Any]) -> None:
        nonlocal ending
        error = answer.exception()
        with lock:
            if ending or whole.done():
                return
            if isinstance(error, shared):
                whole.set_exception(error)
            elif error is not None:
                ending = True
                timer = threading.Timer(GRACE_SECONDS, give_up, args=(error,))
                timer.daemon = True
                timer.start()
            elif all(each.done() and each.exception() is None for each in answers):
                whole.set_result(answers[0].result())

    for answer in answers:
        answer.add_done_callback(take)
    return whole
