"""What a run tells of itself stays small, however many prompts, samples and evaluations there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from deploy.recorder import Recorder
from system.config_file import parse
from system.tasks.problem import Problem
from system.trajectory import Prompt
from tests.problems import TOKENIZER, problem


class Kept:
    """A tracker that keeps what it is told of, and what else the recorder talks to."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.number, self.digest = 0, ""

    def dataset(self, name: str, rows: list[dict[str, Any]], count: int, digest: str) -> None:
        self.tables[name], self.number, self.digest = rows, count, digest

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        self.tables[name] = rows

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: None


def recorder(folder: Path, given: Problem, **learner: Any) -> tuple[Recorder, Kept]:
    config = parse({"task": {"kind": "continuation"}, "learner": learner, "tracking": {"sample_table_every": 1}})
    tracker, other = Kept(), cast(Any, Kept())
    return Recorder(config, folder, given, TOKENIZER, *[other] * 3, cast(Any, tracker), *[other] * 3), tracker


def test_of_many_prompts_the_table_has_some_with_those_of_evaluations_and_the_digest_and_number_are_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.recorder.PROMPT_ROWS", 4)
    prompts = tuple(Prompt(f"line-{at}", (at,), (at,)) for at in range(3, 12))
    given = Problem(prompts, problem("continuation").constraints, (0,), held_out=frozenset({"line-10", "line-11"}))
    described, tracker = recorder(tmp_path, given)
    described.describe()
    assert [row["id"] for row in tracker.tables["continuation"]] == ["line-10", "line-11", "line-3", "line-4"]
    assert tracker.number == 9
    other = replace(given, prompts=(*prompts[:5], Prompt(prompts[5].id, (20,), (20,)), *prompts[6:]))
    described, changed = recorder(tmp_path, other)
    described.describe()
    assert changed.tables == tracker.tables and changed.digest != tracker.digest
