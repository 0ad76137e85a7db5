"""What every command has: functions of the user's from where it is started, and errors of one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from deploy.command import FAILED, REFUSED, command
from system.config import ConfigError
from system.functions import import_function
from system.run_error import RunError


def test_a_function_that_a_config_names_is_found_where_the_command_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_of_mine.py").write_text("def score(prompt, text, tokens):\n    return 2.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = []

    @command
    def main(argv: list[str]) -> int:
        found.append(import_function(argv[0], "task.reward.path")(None, "", []))
        return 0

    assert main(["rewards_of_mine:score"]) == 0
    assert found == [2.0]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("task.limit=0: raise it"), REFUSED, "config error: task.limit=0: raise it\n"),
        (RunError("the disk is full"), FAILED, "error: the disk is full\n"),
        (FloatingPointError("update 3: loss nan"), FAILED, "error: update 3: loss nan\n"),
    ],
)
def test_an_error_that_says_what_to_do_is_one_line_and_a_status(
    error: Exception, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main(argv: list[str]) -> int:
        raise error

    assert main([]) == status
    assert capsys.readouterr().err == line


def test_an_error_that_nobody_foresaw_keeps_its_traceback() -> None:
    @command
    def main(argv: list[str]) -> int:
        raise KeyError("x")

    with pytest.raises(KeyError):
        main([])


def test_a_gpu_without_memory_is_one_line_with_the_fields_that_need_less(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    assert main([]) == FAILED
    line = capsys.readouterr().err
    assert line.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. To need less: ")
    assert "learner.gradient_checkpointing=true" in line
    assert line.count("\n") == 1
