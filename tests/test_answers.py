"""Several answers as one, on plain futures."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest

from deploy import answers
from deploy.answers import first_of_all


class Died(Exception):
    """Stands for a process that is gone."""


def ask(count: int = 3) -> tuple[list[Future[Any]], Future[Any], list[float]]:
    """Answers to come, what they are together, and when all were ended."""
    parts: list[Future[Any]] = [Future() for _ in range(count)]
    ended: list[float] = []
    return parts, first_of_all(parts, FloatingPointError, Died, lambda: ended.append(time.monotonic())), ended


def test_the_first_answer_is_given_once_all_are_there() -> None:
    parts, whole, ended = ask()
    for number in (0, 2, 1):
        assert not whole.done()
        parts[number].set_result(number)
    assert whole.result(timeout=1) == 0
    assert not ended


def test_an_error_that_all_share_is_passed_on_and_ends_nobody() -> None:
    parts, whole, ended = ask()
    for part in parts:
        part.set_exception(FloatingPointError("not finite"))
    assert isinstance(whole.exception(timeout=1), FloatingPointError)
    assert not ended


def test_an_error_of_one_ends_all_though_the_others_never_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "GRACE_SECONDS", 0.05)
    parts, whole, ended = ask()
    parts[0].set_result(0)
    parts[2].set_exception(MemoryError("too long a row"))
    assert isinstance(whole.exception(timeout=5), MemoryError)
    assert len(ended) == 1


def test_a_death_is_passed_on_before_what_its_peers_say_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "GRACE_SECONDS", 0.2)
    parts, whole, ended = ask()
    parts[0].set_exception(RuntimeError("connection reset by peer"))
    parts[2].set_exception(RuntimeError("connection reset by peer"))
    parts[1].set_exception(Died("killed"))
    assert isinstance(whole.exception(timeout=5), Died)
    assert len(ended) == 1
