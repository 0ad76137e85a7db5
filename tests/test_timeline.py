from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy import report
from system.timeline import Span, Timeline, busy_fraction, chrome_trace


def test_a_span_is_the_time_inside_also_when_it_ends_by_an_error() -> None:
    timeline = Timeline()
    with pytest.raises(KeyError), timeline.span("update", "learner", step=3):
        raise KeyError
    (span,) = timeline.drain()
    assert (span.name, span.track, span.facts) == ("update", "learner", {"step": 3})
    assert 0 <= span.end - span.start < 1
    assert timeline.drain() == []


def test_steps_that_follow_each_other_are_one_span_and_others_are_not() -> None:
    timeline = Timeline()
    for start in (0.0, 1.001, 2.002):
        timeline.add(Span("generate", "engine", start, start + 1, {"version": 1}))
    timeline.add(Span("generate", "engine", 3.003, 4, {"version": 2}))
    timeline.add(Span("generate", "engine", 4.5, 5, {"version": 2}))
    timeline.add(Span("install", "engine", 5, 6, {"version": 2}))
    assert [(span.start, span.end) for span in timeline.drain()] == [(0.0, 3.002), (3.003, 4), (4.5, 5), (5, 6)]


def test_the_busy_fraction_counts_overlaps_once_and_nothing_outside() -> None:
    spans = [Span("a", "t", 4, 6), Span("a", "t", 0, 2), Span("b", "t", 1, 3), Span("b", "t", 9, 20), Span("c", "t", 1.5, 1.7)]
    assert busy_fraction(spans, 1, 11) == pytest.approx((2 + 2 + 2) / 10)
    assert busy_fraction([], 0, 1) == 0
    assert busy_fraction(spans, 5, 5) == 0


def test_the_trace_names_processes_and_tracks_and_is_in_microseconds() -> None:
    trace = chrome_trace({"driver": [Span("wait", "loop", 10, 10.5, {"step": 1})], "sampler": [Span("g", "engine", 10, 11)]})
    named = {(e["pid"], e["name"]): e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert named == {
        (1, "process_name"): "driver", (1, "thread_name"): "loop", (2, "process_name"): "sampler", (2, "thread_name"): "engine",
    }  # fmt: skip
    wait = next(e for e in trace["traceEvents"] if e["name"] == "wait")
    assert (wait["ph"], wait["ts"], wait["dur"], wait["args"]) == ("X", 10e6, 0.5e6, {"step": 1})


def test_sampler_idleness_is_what_their_engines_leave_of_the_training_time(tmp_path: Path) -> None:
    processes = {
        "driver": [Span("evaluate", "loop", 0, 10), Span("wait for groups", "loop", 10, 12), Span("update", "loop", 12, 20)],
        "sampler-0": [Span("generate", "engine", 0, 15), Span("reward", "reward", 15, 20)],
        "sampler-1": [Span("install", "engine", 10, 20)],
        "learner": [Span("update", "learner", 12, 20)],
    }
    path, alive = tmp_path / "timeline.json", ("sampler-0", "sampler-1")
    assert report.timeline(path, processes, alive) == pytest.approx(1 - (0.5 + 1) / 2)
    assert len(json.loads(path.read_text())["traceEvents"]) == 4 + 5 + 7


def test_an_evaluation_is_no_part_of_the_time_in_which_samplers_are_idle(tmp_path: Path) -> None:
    processes = {
        "driver": [
            Span("evaluate", "loop", 0, 10), Span("update", "loop", 10, 20), Span("evaluate", "loop", 20, 60),
            Span("wait for groups", "loop", 60, 62), Span("update", "loop", 62, 70), Span("evaluate", "loop", 70, 90),
        ],
        "sampler-0": [Span("g", "engine", 5, 15), Span("g", "engine", 20, 55), Span("g", "engine", 60, 70)],
    }  # fmt: skip
    idle = report.timeline(tmp_path / "timeline.json", processes, ("sampler-0",))
    assert idle == pytest.approx(1 - (5 + 10) / 20)


def test_a_sampler_is_idle_only_while_it_is_there(tmp_path: Path) -> None:
    processes = {
        "driver": [Span("update", "loop", 0, 20)],
        "sampler-0": [Span("generate", "engine", 0, 5)],  # lost, and replaced by the next one
        "sampler-1": [Span("generate", "engine", 15, 20)],
    }
    assert report.timeline(tmp_path / "timeline.json", processes, ("sampler-1",)) == pytest.approx(0.0)
    assert report.timeline(tmp_path / "timeline.json", processes, ("sampler-0", "sampler-1")) == pytest.approx(1 - 10 / 25)
