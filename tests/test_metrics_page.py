"""deploy/metrics.md has every metric that the code logs, and no other; its meanings are those of the report."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from actors.sampler import Sampler
from deploy.baselines import MEANS
from deploy.html_report import MEANING
from deploy.ray_metrics import RayMetrics
from deploy.report import summary
from learner.learner import Learner
from system import evaluation
from system.constraints import Constraints
from system.evaluation import Evaluation, Judge
from system.loop_state import Counters
from system.posterior import Exact
from system.process_metrics import system_metrics
from system.scores import Scores
from system.trajectory import Group, Prompt, Trajectory, sampled
from tests import tiny
from tests.fakes import PROMPTS, FakeLearner, FakeSamplers
from tests.loops import config, orchestrator
from tests.problems import problem
from tests.test_evaluation import Scores as ScoresOfSamples
from tests.test_evaluation import evaluated

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "deploy" / "metrics.md").read_text(encoding="utf-8")
METRICS, _, REST = PAGE.partition("## In summary.json")
SUMMARY, _, PROMETHEUS = REST.partition("## At Prometheus")
CODE = [path for folder in ("system", "actors", "learner", "deploy") for path in (ROOT / folder).rglob("*.py")]
NAME = re.compile(
    r"(?:exact|posterior|task|length|log_reward|replay|idle|groups|samplers|learner|seconds|rate|tokens)/[a-z0-9_]+"
)
OF_A_RUN = {"run", "task", "loss", "seed"}
"""In a summary, and no figure that it found."""


def rows(page: str) -> Iterator[list[str]]:
    """The cells of the tables, but for heads and rules."""
    for line in page.splitlines():
        if line.startswith("| `"):
            yield [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def names(page: str) -> set[str]:
    return {row[0].strip("`") for row in rows(page)}


def of_updates(folder: Path) -> set[str]:
    loop = orchestrator(folder, config(steps=1), FakeSamplers(), FakeLearner())
    loop.train()
    of_loop = {name for _, values in loop.tracker.logged for name in values}  # type: ignore[attr-defined]
    constraints = Constraints.of(stop_token=9, min_tokens=1, max_tokens=6, vocab_size=tiny.VOCABULARY, allowed=range(10, 30))
    learner = Learner(config(threads=1), tiny.folder(folder / "model"), constraints, "base", range(10, 40))
    group = Group(Prompt("p", (30,), (30,)), (sampled([10]), sampled([11, 12])), (np.zeros(2), np.zeros(3)), 0, 0)
    return of_loop | set(learner.update([group]))


def of_evaluations() -> set[str]:
    half_O = np.log([0.5, 0.5])
    of_samples = evaluated(FakeSamplers(), judge=of_texts()).metrics.keys() | of_judges()
    return of_samples | Exact.of(half_O, half_O).metrics().keys() | of_choices()


def of_texts() -> Judge:
    return evaluation.judge(problem("random_number"), lambda tokens: "a", FakeRewards(), lambda texts: 0.5)


class FakeRewards:
    """Is never asked where the evidence has no alternatives."""

    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
        raise NotImplementedError


def of_choices() -> set[str]:
    """Where the policy answers by one of a few labels."""
    label = sampled([5])
    labels = replace(problem("random_number"), prompts=PROMPTS, choices=(label,))
    labels = replace(labels, demonstrations={prompt.id: (label,) for prompt in PROMPTS})
    return set(evaluation.chosen(labels, ScoresOfSamples()).metrics)


def of_judges() -> set[str]:
    """What those say that are told how many samples have no reward, of whatever task."""
    functions = [
        node
        for path in (ROOT / "system").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and "unscored" in [argument.arg for argument in node.args.args]
    ]
    found = {
        key.value
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    assert {"accuracy", "votes_agree", "validity", "bleu_4"} <= found
    return {f"task/{name}" for name in found}


def written_out() -> set[str]:
    """What the code has as a whole name, or puts among an evaluation's metrics."""
    found: set[str] = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Constant(value=str(name)) if NAME.fullmatch(name):
                    found.add(name)
                case ast.BinOp(left=ast.Attribute(attr="metrics"), op=ast.BitOr(), right=ast.Dict(keys=keys)):
                    found |= {str(key.value) for key in keys if isinstance(key, ast.Constant)}
    assert {"idle/samplers", "posterior/log_z_upper", "task/max_log_likelihood", "seconds_training"} <= found
    return found


def of_processes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Of one that uses CUDA, and is a sampler."""
    answers = {"is_available": True, "is_initialized": True, "mem_get_info": (1, 2), "memory_allocated": 1}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    engine: Any = SimpleNamespace(tokens=0, prompt_tokens=0, close=lambda: None)
    reward: Any = SimpleNamespace(tokens_forwarded=0)
    sampler = Sampler(lambda: engine, reward)
    stats = sampler.stats()
    sampler.close()
    return {f"system/PROCESS/{name}" for name in stats | system_metrics()}


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    found = of_updates(tmp_path) | of_evaluations() | written_out() | of_processes(monkeypatch)
    of_methods = {name for name in MEANS if not name.endswith("/")}
    # A factor of a reward has the name that a config gives it.
    return {re.sub(r"(^|/)reward/\w+$", r"\1reward/NAME", name) for name in found | of_methods}


def test_the_page_has_every_metric_that_is_logged_and_no_other(logged: set[str]) -> None:
    assert (sorted(logged - names(METRICS)), sorted(names(METRICS) - logged)) == ([], [])


def test_the_page_has_every_figure_of_a_summary_and_no_other() -> None:
    row = {"prompt": "a", "log_z_lower": 0.0, "spread": 1.0}
    evaluations = [(step, Evaluation({}, [row])) for step in range(2)]
    assert summary(config(), Counters(), evaluations, 1.0, finished=True).keys() - OF_A_RUN == names(SUMMARY)


def test_the_page_has_every_figure_for_prometheus_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made: set[str] = set()

    def kind(ending: str) -> Any:
        def make(name: str, *_: Any) -> Mock:
            made.add(f"ray_{name}{ending}")
            return Mock()

        return make

    monkeypatch.setattr("deploy.ray_metrics.Gauge", kind(""))
    monkeypatch.setattr("deploy.ray_metrics.Counter", kind("_total"))
    RayMetrics("run-1")
    assert made == names(PROMETHEUS)


def test_the_page_and_the_report_say_the_same() -> None:
    meanings = {row[0].strip("`"): (row[1], row[2]) for row in rows(METRICS)}
    for name, said in MEANING.items():
        unit, meaning = meanings[name]
        assert said.replace(f", {unit}", "", 1) == meaning, name


def test_every_row_has_a_cell_for_each_column() -> None:
    heads = [line.count("|") for line in PAGE.splitlines() if line.startswith("| name |")]
    assert {len(row) + 1 for row in rows(PAGE)} == set(heads)
    assert all(all(row) for row in rows(PAGE))
