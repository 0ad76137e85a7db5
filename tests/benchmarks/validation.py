"""The paper's data with a part of the training data in place of the test data: what settings are chosen on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from system.tasks.arithmetic import QUESTION, generate, steps_of

HELD_OUT = {"prompts": 50, "stories": 20, "questions": 100, "texts": 200}
"""Records of each kind, at least."""


def write(data: Path, folder: Path) -> Path:
    """`folder`, with the files of `data` that the experiments read. No record of a test file of `data` is in any of them."""
    for name, files in {"prompts": _prompts, "stories": _stories, "arithmetic": _arithmetic, "subj": _subj}.items():
        if (data / name).is_dir() and not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            files(data / name, folder / name)
    return folder


def _prompts(data: Path, folder: Path) -> None:
    """Experiments hold out the last 50: those of `data` are left out, and the 50 before them are the last."""
    lines = (data / "openwebtext_1000.txt").read_text(encoding="utf-8").splitlines()
    (folder / "openwebtext_1000.txt").write_text("\n".join(lines[: -HELD_OUT["prompts"]]) + "\n", encoding="utf-8")


def _stories(data: Path, folder: Path) -> None:
    """No fable is in both files."""
    by_title: dict[str, list[dict[str, Any]]] = {}
    for story in read_lines(data / "train.jsonl"):
        by_title.setdefault(story["title"], []).append(story)
    held_out: list[dict[str, Any]] = []
    while len(held_out) < HELD_OUT["stories"]:
        held_out += by_title.pop(next(reversed(by_title)))
    write_lines(folder / "train.jsonl", [story for stories in by_title.values() for story in stories])
    write_lines(folder / "test.jsonl", held_out)


def _arithmetic(data: Path, folder: Path) -> None:
    """3 and 4 operands from the end of the training questions; 5 and 6 generated, none of them a test question of `data`."""
    questions = json.loads((data / "train_questions_1000.json").read_text(encoding="utf-8"))
    by_operands: dict[int, list[dict[str, Any]]] = {3: [], 4: []}
    for question in reversed(questions):
        if len(chosen := by_operands[_operands(question["str_query"])]) < HELD_OUT["questions"]:
            chosen.append(question)
    asked = {question["str_query"] for chosen in by_operands.values() for question in chosen}
    rest = [question for question in questions if question["str_query"] not in asked]
    for operands in (5, 6):
        known = json.loads((data / f"test_{operands}_operands.json").read_text(encoding="utf-8"))
        refused = {question["str_query"] for question in known}
        new = [question for question in generate((operands,), 400, test=True) if question.text not in refused]
        by_operands[operands] = [{"str_query": question.text, "num_sol": question.answer} for question in new]
    for operands, chosen in by_operands.items():
        (folder / f"test_{operands}_operands.json").write_text(json.dumps(chosen), encoding="utf-8")
    (folder / "train_questions_1000.json").write_text(json.dumps(rest), encoding="utf-8")
    worked = (data / "train_rationales_50.json").read_text(encoding="utf-8")
    (folder / "train_rationales_50.json").write_text(worked, encoding="utf-8")


def _operands(query: str) -> int:
    asked = QUESTION.fullmatch(query.strip())
    assert asked is not None, query
    return len(steps_of(asked.group(1))) + 1


def _subj(data: Path, folder: Path) -> None:
    """From the 8,000 that may be trained on, none of them among the 10, 20 or 50 that are."""
    used: set[str] = set()
    for labelled in (10, 20, 50):
        lines = (data / f"train.{labelled}.jsonl").read_text(encoding="utf-8")
        (folder / f"train.{labelled}.jsonl").write_text(lines, encoding="utf-8")
        used |= {record["text"] for record in read_lines(data / f"train.{labelled}.jsonl")}
    others = [record for record in read_lines(data / "train.jsonl") if record["text"] not in used]
    write_lines(folder / "test.jsonl", random.Random(0).sample(others, HELD_OUT["texts"]))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """`path` as JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
