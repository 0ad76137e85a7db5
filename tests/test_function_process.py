"""A user's function in a process of its own: what hangs or crashes there harms one call alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from system.config import ConfigError
from system.function_process import FunctionFault, FunctionProcess
from system.trajectory import Prompt

PROMPT = Prompt("x", (1,), (1,), meta={"answer": (1, "a")})
LIMIT = 2


@pytest.fixture
def score() -> Iterator[FunctionProcess]:
    process = FunctionProcess("tests.faulty:score", "task.reward.path", LIMIT)
    yield process
    process.close()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_function_answers_from_another_process() -> None:
    function = FunctionProcess("tests.faulty:process_id", "task.reward.path", 10)
    first, second = function(PROMPT, "", []), function(PROMPT, "", [])
    assert first == second != os.getpid()
    function.close()
    wait_until(lambda: gone(first))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("raise", "ArithmeticError: log of zero"),
        ("sleep", "no answer after 2 s"),
        ("spin", "no answer after 2 s"),
        ("exit", "SystemExit: 3"),
        ("crash", "its process ended with exit code 7"),
    ],
)
def test_a_call_that_fails_says_how_and_the_next_one_is_answered(score: FunctionProcess, text: str, fault: str) -> None:
    assert score(PROMPT, "good", [1]) == -4.0
    started = time.monotonic()
    with pytest.raises(FunctionFault, match=fault):
        score(PROMPT, text, [1])
    assert time.monotonic() - started < 15
    assert score(PROMPT, "good", [1]) == -4.0


def test_a_process_that_was_killed_between_two_calls_is_no_fault(score: FunctionProcess) -> None:
    score(PROMPT, "good", [])
    score._process.kill()
    score._process.wait()
    assert score(PROMPT, "good", []) == -4.0


@pytest.mark.parametrize("path", ["no_such_module_here:f", "tests.faulty:none", "tests.faulty:__name__"])
def test_a_function_that_is_not_there_is_a_config_error(path: str) -> None:
    with pytest.raises(ConfigError, match=f"task.reward.path='{path}'"):
        FunctionProcess(path, "task.reward.path", 10).start()


def test_a_module_that_ends_its_process_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_exit.py").write_text("import os\nos._exit(4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="ended with exit code 4 while importing"):
        FunctionProcess("own_exit:f", "task.reward.path", 10).start()


CALLER = """
import sys, threading
from system.function_process import FunctionProcess
from system.trajectory import Prompt
prompt = Prompt("x", (1,), (1,))
function = FunctionProcess("tests.faulty:score", "task.reward.path", 600)
function(prompt, "good", [])
print(function._process.pid, flush=True)
function(prompt, "spin", [])
"""


def test_a_call_that_hangs_ends_with_a_caller_that_is_killed() -> None:
    caller: Any = subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True)
    pid = int(caller.stdout.readline())
    time.sleep(0.3)  # the second call is under way
    assert not gone(pid)
    caller.kill()
    caller.wait()
    wait_until(lambda: gone(pid))


def test_a_call_that_takes_too_long_ends_with_what_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with pytest.raises(FunctionFault, match="no answer after 2 s"):
        FunctionProcess("tests.faulty:leaves_a_child", "task.reward.path", 2)(PROMPT, str(file), [])
    wait_until(lambda: gone(int(file.read_text())))


def test_a_thread_that_ends_takes_its_process_along_and_the_next_call_starts_another(score: FunctionProcess) -> None:
    thread = threading.Thread(target=score.start)
    thread.start()
    thread.join()
    wait_until(lambda: gone(score._process.pid))
    assert score(PROMPT, "good", []) == -4.0
