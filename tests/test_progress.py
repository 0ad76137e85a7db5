from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from deploy import progress
from deploy.progress import Lines, Screen, Standing, show
from system.orchestrator import Orchestrator
from system.trajectory import Group
from tests.fakes import FakeLearner, FakeSamplers
from tests.loops import config, orchestrator

METRICS = {
    "loss": 0.25, "log_z": -3.5, "spread": 12.0, "ess": 0.5, "length/mean": 4.0, "rate/trajectories_per_second": 7.5,
    "staleness": 1.5, "idle/learner": 0.25, "samplers/deaths": 0.0,
}  # fmt: skip


def standing(step: int, **changes: float) -> Standing:
    return Standing("run-1", 10, step, 75.0, METRICS | changes, {"a": 0.2, "b": 0.4})


def test_lines_come_at_once_then_seldom_and_for_the_last_step() -> None:
    out = io.StringIO()
    shown = show(out)
    assert isinstance(shown, Lines)
    for step in range(1, 11):
        shown.update(standing(step))
    shown.say("evaluation")
    first, last, said = out.getvalue().splitlines()
    assert first.startswith("step 1/10  loss 0.25  log_z -3.500  spread 12  ess 0.50  length 4.0  7.5 traj/s  staleness 1.5")
    assert first.endswith("learner idle 25%  samplers idle 30%  1 min 15 s left")
    assert last.startswith("step 10/10")
    assert said == "evaluation"


def test_deaths_are_shown_once_there_are_some() -> None:
    out = io.StringIO()
    Lines(out).update(standing(1))
    Lines(out).update(standing(1, **{"samplers/deaths": 2.0}))
    assert ["deaths" in line for line in out.getvalue().splitlines()] == [False, True]


@pytest.fixture
def terminal() -> Iterator[tuple[io.StringIO, Screen]]:
    out = io.StringIO()
    screen = Screen(Console(file=out, force_terminal=True, width=110, height=30))
    yield out, screen
    screen.close()


def test_a_terminal_gets_a_display_with_a_bar_and_messages_above_it(terminal: tuple[io.StringIO, Screen]) -> None:
    out, screen = terminal
    screen.update(standing(5))
    screen.say("evaluation [red]at step 5")
    screen.update(standing(6))
    screen.close()
    text = out.getvalue()
    assert "━" in text and "\x1b[" in text
    assert "run-1" in text and "6/10" in text and "1 min 15 s left" in text
    assert "evaluation [red]at step 5" in text, "a message is text and not markup"
    assert text.rindex("samplers idle 30%") > text.index("evaluation")


def test_a_run_of_the_loop_is_drawn_on_a_real_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    cfg = config(steps=3)
    terminal, side = os.openpty()
    with open(side, "w") as out:
        shown = show(out)
        assert isinstance(shown, Screen)

        def on_step(loop: Orchestrator, metrics: dict[str, float], _: list[Group]) -> None:
            shown.update(Standing("run-1", cfg.learner.steps, loop.counters.step, metrics=metrics))

        orchestrator(tmp_path, cfg, FakeSamplers(), FakeLearner(), on_step=on_step).train()
        shown.close()
    drawn = b""
    # With its other end closed, a terminal that is read to the end fails.
    with open(terminal, "rb", buffering=0) as screen, suppress(OSError):
        while more := screen.read(4096):
            drawn += more
    text = drawn.decode()
    assert "\x1b[" in text and "run-1" in text and "3/3" in text
    assert re.search(r"loss 0\.3333 +log_z 0\.000 +spread 0 +ess 1\.00 +length \d", text)
    assert "learner idle" in text


def test_log_handlers_follow_stderr_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stderr, out = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    handler = logging.StreamHandler(stderr)
    logging.getLogger().addHandler(handler)
    try:
        screen = Screen(Console(file=out, force_terminal=True, width=110, height=30))
        logging.getLogger("headwater").warning("a sampler died")
        screen.close()
        assert handler.stream is stderr is sys.stderr
    finally:
        logging.getLogger().removeHandler(handler)
    assert "a sampler died" in out.getvalue()
    assert "a sampler died" not in stderr.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s left"), (65, "1 min 05 s left"), (7500, "2 h 05 min left")])
def test_the_time_left_is_rounded(seconds: float, text: str) -> None:
    assert progress._left(Standing("a", 10, seconds_left=seconds)) == text
