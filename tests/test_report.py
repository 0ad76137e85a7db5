from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import report
from system import evaluation_files, tasks
from system.config_file import parse
from system.evaluation import Evaluation
from system.loop_state import Counters
from system.task_config import Task, is_same
from tests import tiny

TOKENIZER = tiny.tokenizer()


def sampled(spread: float, bound: float) -> Evaluation:
    row = {"log_z_lower": bound, "log_z_weighted": bound, "spread": spread, "ess": 0.5, "length": 3.0}
    samples = [{"prompt": "a", "log_q": -1.0 * k, "log_reward": -2.0 * k, "text": "x", "length": k} for k in range(4)]
    metrics = {"posterior/spread": spread, "posterior/log_z_lower": bound}
    return Evaluation(metrics, [{"prompt": "a", **row}, {"prompt": "b", **row}], samples)


def exact(log_q_O: np.ndarray) -> Evaluation:
    return Evaluation({"exact/kl_target_q": 0.5}, [], log_q_O=log_q_O)


def test_the_summary_compares_prompt_by_prompt() -> None:
    config = parse({"task": {"kind": "continuation"}})
    counters = Counters(step=5, groups=5, trajectories=50, sampled_tokens=600, seconds=10.0, learner_busy_seconds=4.0)
    figures = report.summary(config, counters, [(0, sampled(100.0, -9.0)), (5, sampled(4.0, -5.0))], 12.3, finished=True)
    assert figures["trajectories_per_second"] == 5.0
    assert figures["learner_idle"] == 0.6
    assert figures["sampled_tokens"] == 600
    assert figures["spread_factor_median"] == pytest.approx(25.0)
    assert figures["prompts_bound_rose"] == figures["prompts"] == 2


def test_a_run_that_was_not_evaluated_since_it_began_says_nothing_of_what_it_learned() -> None:
    figures = report.summary(parse({"task": {"kind": "continuation"}}), Counters(step=5), [(0, sampled(9.0, -9.0))], 1.0, False)
    assert not figures.keys() & {"before", "after", "after_step", "prompts_bound_rose"}


def test_the_table_has_a_column_for_each_evaluation_or_the_first_and_the_last_of_many() -> None:
    few = [(step, sampled(4.0, -5.0)) for step in range(6)]
    assert report.shown(few) == few
    many = [*few, (9, sampled(1.0, -4.0))]
    assert report.shown(many) == [many[0], many[-1]]


def test_the_table_has_every_metric_of_every_column_and_says_where_there_is_none() -> None:
    text = report.table({"step 0": {"task/distinct_answers": 2.0}, "step 5": {"task/bleu_4": 0.5}})
    lines = [line.split() for line in text.splitlines()]
    assert lines == [["step", "0", "step", "5"], ["task/distinct_answers", "2", "nan"], ["task/bleu_4", "nan", "0.5"]]


def test_a_prompt_keeps_its_place_in_the_plot_where_others_lost_their_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = sampled(100.0, -9.0), sampled(4.0, -5.0)
    for result, bounds in ((before, {"a": -1.0, "b": -3.0, "c": -2.0}), (after, {"c": -0.2, "d": -0.4, "a": -0.1})):
        row = result.per_prompt[0]
        result.per_prompt[:] = [row | {"prompt": prompt, "log_z_lower": bound} for prompt, bound in bounds.items()]
    closed = []
    monkeypatch.setattr(report.plt, "close", closed.append)
    report.posterior_plot(tmp_path / "posterior.png", {"one": before, "two": after})
    monkeypatch.undo()
    [figure] = closed
    lines = [container.lines[0] for container in figure.axes[0].containers]
    places = [dict(zip(line.get_ydata().tolist(), line.get_xdata().tolist(), strict=True)) for line in lines]
    # By their bounds before, b, c, a; d came later.
    assert places == [{-1.0: 2, -3.0: 0, -2.0: 1}, {-0.2: 1, -0.4: 3, -0.1: 2}]
    report.plt.close(figure)


def test_a_policy_alone_has_the_colour_that_it_has_beside_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Any] = []
    monkeypatch.setattr(report.plt, "close", closed.append)
    one = sampled(4.0, -5.0)
    for policies in ({"base": one, "adapter": one}, {"base": one, "adapter": None}, {"base": None, "adapter": one}):
        report.posterior_plot(tmp_path / "posterior.png", policies)
    monkeypatch.undo()
    colours = [[container.lines[0].get_color() for container in figure.axes[0].containers] for figure in closed]
    assert colours == [[report.BASE, report.TUNED], [report.BASE], [report.TUNED]]
    for figure in closed:
        report.plt.close(figure)


@pytest.mark.parametrize("kind", ["random_number", "continuation"])
def test_a_plot_is_drawn_for_listed_and_for_sampled_outcomes(kind: str, tmp_path: Path) -> None:
    problem = tasks.build(parse({"task": {"kind": kind}}).task, TOKENIZER)
    if kind == "random_number":
        assert problem.log_target_O is not None
        evaluations = [(0, exact(problem.log_target_O + 0.3)), (9, exact(problem.log_target_O))]
    else:
        evaluations = [(0, sampled(100.0, -9.0)), (9, sampled(4.0, -5.0))]
    (path,) = report.plots(tmp_path, problem, TOKENIZER, evaluations)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_an_evaluation_without_samples_has_no_plot(tmp_path: Path) -> None:
    problem = tasks.build(parse({"task": {"kind": "continuation"}}).task, TOKENIZER)
    chosen = Evaluation({"task/accuracy": 0.5}, [{"prompt": "a", "task/log_likelihood": -1.0}])
    assert report.plots(tmp_path, problem, TOKENIZER, [(0, chosen), (9, chosen)]) == []


def test_evaluations_are_read_back_as_written(tmp_path: Path) -> None:
    task = parse({"task": {"kind": "random_number"}}).task
    evaluation_files.write(tmp_path, 0, task, exact(np.array([-1.0, -2.0])))
    evaluation_files.write(tmp_path, 12, task, sampled(4.0, -5.0))
    evaluation_files.write(tmp_path, 20, task, sampled(5.0, -5.0))
    [(first, a), (second, b)] = evaluation_files.read(tmp_path, task, 19)
    assert (first, second) == (0, 12)
    assert a.log_q_O is not None and a.log_q_O.tolist() == [-1.0, -2.0]
    assert b.metrics == sampled(4.0, -5.0).metrics
    assert b.per_prompt == sampled(4.0, -5.0).per_prompt


def test_evaluations_of_a_task_that_a_run_was_resumed_with_hide_none_of_the_one_before(tmp_path: Path) -> None:
    first, second = (parse({"task": {"kind": "random_number", "high": high}}).task for high in (100, 50))
    for step, task, spread in ((0, first, 9.0), (4, first, 4.0), (4, second, 7.0), (8, second, 5.0)):
        evaluation_files.write(tmp_path, step, task, sampled(spread, -5.0))

    def found(task: Task) -> list[tuple[int, float]]:
        return [(step, result.metrics["posterior/spread"]) for step, result in evaluation_files.read(tmp_path, task, 99)]

    assert found(first) == [(0, 9.0), (4, 4.0)]
    assert found(second) == [(4, 7.0), (8, 5.0)]


def test_an_evaluation_takes_the_place_of_the_one_that_the_same_task_had_at_its_step(tmp_path: Path) -> None:
    task = parse({"task": {"kind": "constrained", "keywords": ["sea"]}}).task
    evaluation_files.write(tmp_path, 4, task, sampled(9.0, -5.0))
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    # As an earlier version wrote it: before the task had a field, or before evaluations had a task.
    del content["task"]["guided"]
    path.rename(tmp_path / "step-00000004-00000000.json").write_text(json.dumps(content))
    del content["task"]
    (tmp_path / "step-00000002.json").write_text(json.dumps(content | {"step": 2}))
    assert [step for step, _ in evaluation_files.read(tmp_path, task, 9)] == [2, 4]
    evaluation_files.write(tmp_path, 4, task, sampled(7.0, -5.0))
    assert [result.metrics["posterior/spread"] for _, result in evaluation_files.read(tmp_path, task, 9)] == [9.0, 7.0]


def test_a_task_that_was_kept_before_it_had_a_field_is_the_same_with_the_fields_default(tmp_path: Path) -> None:
    task = parse({"task": {"kind": "constrained", "keywords": ["sea"]}}).task
    kept = task.model_dump(mode="json")
    assert is_same(task, kept)
    del kept["guided"]
    assert is_same(task, kept)
    assert not is_same(task, kept | {"keywords": ["lake"]})
    assert not is_same(task, kept | {"unknown": 1})
    assert not is_same(task, parse({"task": {"kind": "continuation"}}).task.model_dump(mode="json"))


def test_a_reward_that_may_take_longer_is_the_same_reward() -> None:
    def task(**settings: Any) -> Task:
        function = {"kind": "function", "path": "tests.faulty:digits"} | settings
        reward = {"kind": "product", "of": [{"kind": "lm_posterior"}, function]}
        return parse({"task": {"kind": "continuation", "reward": reward}, "loss": {"kind": "vargrad"}}).task

    kept = task().model_dump(mode="json")
    assert is_same(task(seconds=60, start_seconds=99, concurrency=4), kept)
    assert not is_same(task(beta=0.5), kept)


def test_a_run_that_goes_on_from_an_earlier_step_forgets_what_was_found_later(tmp_path: Path) -> None:
    task, other = (parse({"task": {"kind": kind}}).task for kind in ("continuation", "infilling"))
    for step in (0, 80, 90):
        evaluation_files.write(tmp_path, step, task, sampled(float(step), -5.0))
    evaluation_files.write(tmp_path, 90, other, sampled(1.0, -5.0))
    assert [step for step, _ in evaluation_files.go_back(tmp_path, task, 80)] == [0, 80]
    assert [step for step, _ in evaluation_files.read(tmp_path, task, 99)] == [0, 80]
    assert [step for step, _ in evaluation_files.read(tmp_path, other, 99)] == [90]
