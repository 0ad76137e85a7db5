"""The evaluations of a run, a file each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from system.evaluation import Evaluation
from system.task_config import Task, is_same
from system.whole_file import replace_text


def write(folder: Path, step: int, task: Task, evaluation: Evaluation) -> None:
    """A file in `folder`, from which `read` rebuilds the evaluation. A run that is resumed with another task may have one of
    each at the same step."""
    folder.mkdir(parents=True, exist_ok=True)
    section = task.model_dump(mode="json")
    content = asdict(evaluation) | {"step": step, "task": section}
    if evaluation.log_q_O is not None:
        content["log_q_O"] = evaluation.log_q_O.tolist()
    for earlier in folder.glob(f"step-{step:08d}*.json"):
        if _is_of(task, json.loads(earlier.read_text(encoding="utf-8"))):
            earlier.unlink()
    digest = hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()[:8]
    replace_text(folder / f"step-{step:08d}-{digest}.json", json.dumps(content))


def go_back(folder: Path, task: Task, last: int) -> list[tuple[int, Evaluation]]:
    """As `read`, for a run that goes on from step `last`: evaluations of later steps are of weights that are given up, and are
    removed."""
    for path in folder.glob("step-*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if _is_of(task, content) and content["step"] > last:
            path.unlink()
    return read(folder, task, last)


def read(folder: Path, task: Task, last: int) -> list[tuple[int, Evaluation]]:
    """A run's evaluations of the task up to step `last`, with their steps, in order; samples as in `appended`."""
    result: list[tuple[int, Evaluation]] = []
    for path in sorted(folder.glob("step-*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        step, log_q_O, mine = content.pop("step"), content.pop("log_q_O"), _is_of(task, content)
        content.pop("task", None)
        if mine and step <= last:
            found = Evaluation(**content, log_q_O=None if log_q_O is None else np.array(log_q_O))
            result = appended(result, step, found)
    return result


def appended(earlier: Sequence[tuple[int, Evaluation]], step: int, found: Evaluation) -> list[tuple[int, Evaluation]]:
    """`found` behind what was found before. Samples are those of the first and the last alone, which are all that a report
    shows: those of every evaluation of a long run would fill the driver."""
    first, others = earlier[:1], earlier[1:]
    return [*first, *((at, replace(each, samples=[])) for at, each in others), (step, found)]


def _is_of(task: Task, content: Mapping[str, Any]) -> bool:
    """A file without a task is from when a run's folder had those of one task alone."""
    return "task" not in content or is_same(task, content["task"])
