"""What a run tells of itself stays small, however many prompts, samples and evaluations there are."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deploy.recorder import SAMPLE_ROWS, Recorder
from system import evaluation_files
from system.config_file import parse
from system.evaluation import Evaluation
from system.tasks.problem import Problem
from system.text import decode
from system.trajectory import ON_POLICY, Group, Prompt, Request
from tests.fakes import group_for
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
    return Recorder(config, folder, given, TOKENIZER, other, other, cast(Any, tracker), other, other, other), tracker


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


def groups(count: int, samples: int) -> list[Group]:
    return [group_for(Request(at, Prompt(f"line-{at}", (3,), (3,)), (ON_POLICY,) * samples, at), 0) for at in range(count)]


def test_a_table_of_samples_has_as_many_of_each_group_as_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step: Any = SimpleNamespace(counters=SimpleNamespace(step=1, trajectories=0, deaths=0, seconds=1.0))
    made, tracker = recorder(tmp_path, problem("continuation"))
    monkeypatch.setattr(made, "_observer", SimpleNamespace(look=lambda step: None, sampler_idle={}))

    def rows(fresh: list[Group]) -> Counter[str]:
        made.on_step(step, {}, fresh)
        return Counter(row["prompt"] for row in tracker.tables["samples"])

    assert rows(groups(3, 2)) == {"line-0": 2, "line-1": 2, "line-2": 2}
    assert rows(groups(10, 64)) == {f"line-{at}": 25 for at in range(10)}
    assert rows(groups(SAMPLE_ROWS + 9, 2)) == {f"line-{at}": 1 for at in range(SAMPLE_ROWS)}
    [first, *_] = groups(10, 64)
    rows([first])
    texts = [decode(TOKENIZER, trajectory.tokens_T.tolist()) for trajectory in first.trajectories_K]
    assert [row["text"] for row in tracker.tables["samples"]] == texts


def test_samples_are_kept_of_the_first_and_the_last_evaluation_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tracker = recorder(tmp_path, problem("continuation"))
    made.stop = cast(Any, SimpleNamespace(patient=lambda patient: nullcontext()))
    monkeypatch.setattr(made, "_evaluation", lambda step: Evaluation({"x": float(step)}, samples=[{"text": f"at {step}"}]))

    def kept(evaluations: list[tuple[int, Evaluation]]) -> dict[int, list[Any]]:
        return {step: [row["text"] for row in found.samples] for step, found in evaluations}

    for step in (0, 2, 3, 5, 5):
        made.evaluate(cast(Any, SimpleNamespace(counters=SimpleNamespace(step=step, seconds=1.0))))
        assert [row["text"] for row in tracker.tables["posterior_samples"]] == [f"at {step}"]
        assert made.evaluations[-1][1].metrics == {"x": step, "seconds_training": 1.0}
    assert kept(made.evaluations) == {0: ["at 0"], 2: [], 3: [], 5: ["at 5"]}
    assert kept(evaluation_files.read(tmp_path / "evaluations", made.config.task, 99)) == kept(made.evaluations)
    # A run that goes back to an earlier step has the samples of what is the last then.
    assert kept(evaluation_files.go_back(tmp_path / "evaluations", made.config.task, 3)) == {0: ["at 0"], 2: [], 3: ["at 3"]}
