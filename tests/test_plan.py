"""The simulation against cases whose answer is known, and against the real loop with samplers and a learner that sleep."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy import plan
from deploy.durations import Durations
from deploy.simulation import simulate
from learner.replay import Replay
from system.config import Config, ConfigError
from system.config_file import parse
from system.orchestrator import Orchestrator
from system.requests import Requests
from tests.fakes import PROMPTS, FakeLearner, FakeSamplers, FakeTracker

FAST = Durations(update=1.0, adapter=0.0, install=0.0, group=1e-6, reward=0.0, driver=0.0)


def config(**learner: Any) -> Config:
    settings = {"steps": 60, "warmup_steps": 0, "max_staleness": 2, "publish_every": 1} | learner
    return parse({"task": {"kind": "random_number"}, "learner": settings, "sampler": {"samples_per_prompt": 2}})


def test_with_groups_for_nothing_the_learner_is_never_idle() -> None:
    result = simulate(config(), FAST, samplers=1)
    assert result.groups_per_second == pytest.approx(1.0, rel=1e-3)
    assert result.learner_idle == pytest.approx(0.0, abs=1e-3)
    assert result.sampler_idle == pytest.approx(1.0, abs=1e-3)


def test_with_updates_for_nothing_samplers_set_the_rate() -> None:
    slow = replace(FAST, update=1e-6, group=2.0)
    one, four = (simulate(config(max_staleness=8), slow, samplers=count) for count in (1, 4))
    assert one.groups_per_second == pytest.approx(0.5, rel=0.01)
    assert four.groups_per_second == pytest.approx(2.0, rel=0.05)
    assert one.sampler_idle < 0.01


def test_the_driver_is_the_limit_of_many_samplers() -> None:
    wide = config(groups_per_update=16, max_staleness=8)
    durations = Durations(update=0.001, adapter=0.0, install=0.0, group=0.05, reward=0.0, driver=0.01)
    few, many = (simulate(wide, durations, samplers=count) for count in (2, 64))
    assert few.groups_per_second == pytest.approx(2 / 0.05, rel=0.05)
    assert few.driver_busy == pytest.approx(40 * 0.01, rel=0.05)
    assert many.groups_per_second == pytest.approx(1 / 0.01, rel=0.02)
    assert many.driver_busy == pytest.approx(1.0, abs=0.02)


def test_a_synchronous_run_takes_turns_and_is_never_stale() -> None:
    result = simulate(config(max_staleness=0), Durations(1.0, 0.5, 0.25, 2.0, 0.125, 0.0625), samplers=1)
    assert result.groups_per_second == pytest.approx(1 / (1.0 + 0.5 + 0.25 + 2.0 + 0.125 + 0.0625), rel=0.01)
    assert result.staleness == 0
    assert result.learner_idle == pytest.approx(1 - 1.5 / 3.9375, rel=0.01)


def test_staleness_stays_in_the_bound_and_rises_with_it() -> None:
    durations = Durations(1.0, 0.1, 0.1, 0.4, 0.0)
    results = [simulate(config(max_staleness=bound), durations, samplers=2).staleness for bound in (1, 2, 4)]
    assert results == sorted(results)
    assert all(0 < staleness <= bound for staleness, bound in zip(results, (1, 2, 4), strict=True))


def test_shared_cores_slow_everyone_down() -> None:
    durations = Durations(1.0, 0.0, 0.0, 1.0, 0.0)
    apart, shared = (simulate(config(max_staleness=4), durations, samplers=1, cores=cores) for cores in (2, 1))
    assert apart.groups_per_second == pytest.approx(1.0, rel=0.02)
    assert shared.groups_per_second == pytest.approx(0.5, rel=0.02)


def test_every_rank_of_the_learner_takes_a_core() -> None:
    ranks = config(ranks=2, groups_per_update=2)
    apart, shared = (simulate(ranks, replace(FAST, group=0.0), samplers=1, cores=cores) for cores in (2, 1))
    assert apart.groups_per_second == pytest.approx(2.0, rel=0.02)
    assert shared.groups_per_second == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(("samplers", "max_staleness", "publish_every"), [(1, 1, 1), (1, 2, 2), (2, 3, 1)])
def test_the_real_loop_with_sleeping_parts_runs_as_simulated(
    tmp_path: Path, samplers: int, max_staleness: int, publish_every: int
) -> None:
    cfg = config(steps=40, max_staleness=max_staleness, publish_every=publish_every, checkpoint_every=1000)
    fakes = FakeSamplers(workers=samplers, fate=lambda _: time.sleep(0.03))
    learner = FakeLearner(during_update=lambda: time.sleep(0.02))
    requests = Requests(PROMPTS, 2, cfg.sampler.exploration, 0, cfg.task.max_tokens)
    loop = Orchestrator(cfg, requests, fakes, learner, Replay(cfg.replay), FakeTracker(), tmp_path)
    loop.train()
    simulated = simulate(cfg, Durations(0.02, 0.0, 0.0, 0.03, 0.0), samplers)
    staleness = loop.tracker.series("staleness")  # type: ignore[attr-defined]
    # Rates depend on the machine; how many updates a group waits for does not.
    assert sum(staleness) / len(staleness) == pytest.approx(simulated.staleness, abs=0.35)


def trace(**spans: list[float]) -> dict[str, Any]:
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "driver"}}]
    for name, seconds in spans.items():
        of = {"ph": "X", "pid": 2, "cat": "x", "name": name, "ts": 0, "args": {"group": 0}}
        events += [of | {"dur": 2e6 * s, "tdur": 1e6 * s} for s in seconds]
    return {"traceEvents": [*events, {"ph": "X", "pid": 1, "cat": "loop", "name": "update", "dur": 9e9, "tdur": 9e9}]}


def test_durations_come_from_a_timeline_without_the_first_of_each() -> None:
    measured = trace(update=[9, 1, 2, 3], adapter=[9, 0.5], install=[9, 0.25], generate=[3, 1], reward=[0.1, 0.1])
    assert Durations.of_trace(measured, one_thread=True) == Durations(2, 0.5, 0.25, 2.0, 0.1)
    assert Durations.of_trace(measured, one_thread=False) == Durations(4, 1.0, 0.5, 4.0, 0.2)
    with pytest.raises(ConfigError, match="too few spans of adapter, install"):
        Durations.of_trace(trace(update=[1, 1], generate=[1], reward=[1], install=[1]), one_thread=True)


def test_durations_are_not_those_of_an_evaluations_groups() -> None:
    measured = trace(update=[9, 1, 2, 3], adapter=[9, 0.5], install=[9, 0.25], generate=[3, 1], reward=[0.1, 0.1])
    # A group of training may wait for its reward there, and the first version is installed there.
    events = [event | {"ts": 50e6} if event["name"] in ("install", "reward") else event for event in measured["traceEvents"]]
    slow = {"ts": 50e6, "dur": 40e6, "tdur": 20e6, "args": {"group": -1}}
    inside = [event | slow for event in events if event["name"] in ("generate", "reward")]
    pause = {"ph": "X", "cat": "loop", "name": "evaluate", "pid": 9, "ts": 40e6, "dur": 20e6, "tdur": 0.0}
    mixed = {"traceEvents": [pause, *events, *inside]}
    assert Durations.of_trace(mixed, one_thread=True) == Durations.of_trace(measured, one_thread=True)


def test_the_command_prints_a_table_and_says_how_many_are_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    base = ["deploy/configs/random_number.yaml", "--samplers", "1,2,3"]
    assert plan.main([*base, "--update", "0.1", "--group", "0.2", "--install", "0.01"]) == 0
    output = capsys.readouterr().out
    assert "enough for this learner" in output
    assert len(output.splitlines()) == 6
    content = trace(update=[1, 1], adapter=[0.1, 0.1], install=[0.1, 0.1], generate=[1], reward=[1])
    (tmp_path / "timeline.json").write_text(json.dumps(content))
    assert plan.main([*base, "--run", str(tmp_path)]) == 2
    assert "no such run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(Path("deploy/configs/random_number.yaml").read_text())
    assert plan.main([*base, "--run", str(tmp_path)]) == 0
    assert "Durations(update=1.0, adapter=0.1, install=0.1, " in capsys.readouterr().out
    other = [*base, "--run", str(tmp_path), "--update", "0.5", "--adapter", "0", "sampler.samples_per_prompt=7"]
    assert plan.main(other) == 0
    printed = capsys.readouterr()
    assert "Durations(update=0.5, adapter=0.0, install=0.1, " in printed.out
    assert "the run has groups of 48, the config of 7" in printed.err
    assert plan.main([*base, "--run", str(tmp_path), "--update", "0"]) == 2
    assert "--update=0.0: must be above 0" in capsys.readouterr().err
    assert plan.main(base) == 2
    assert "--update, --group, --install" in capsys.readouterr().err
    assert plan.main([*base, "--run", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--samplers", "0", "--samplers=0: needs whole numbers of 1 or more"),
        ("--samplers", "1,two", "--samplers=1,two: needs whole numbers"),
        ("--samplers", "1,-2", "--samplers=1,-2: needs whole numbers"),
        ("--samplers", "", "--samplers=: needs whole numbers"),
        ("--cores", "0", "--cores=0.0: must be above 0"),
        ("--cores", "nan", "--cores=nan: must be above 0"),
        ("--update", "0", "--update=0.0: must be above 0"),
        ("--group", "-1", "--group=-1.0: must be above 0"),
        ("--install", "inf", "--install=inf: must be 0 or more"),
        ("--reward", "-1", "--reward=-1.0: must be 0 or more"),
        ("--driver", "0", "--driver=0.0: must be above 0"),
    ],
)
def test_an_option_that_cannot_be_simulated_is_named(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config_path = str(Path(__file__).resolve().parents[1] / "deploy/configs/random_number.yaml")
    options = {"--update": "0.1", "--group": "0.2", "--install": "0"} | {option: value}
    assert plan.main([config_path, *(f"{name}={given}" for name, given in options.items())]) == 2
    assert message in capsys.readouterr().err


def test_without_cores_to_share_the_pace_is_the_same_for_any_number_of_samplers() -> None:
    results = [simulate(config(), Durations(1.0, 0.1, 0.1, 0.1, 0.0), count, math.inf) for count in (4, 16)]
    assert results[0].groups_per_second == pytest.approx(results[1].groups_per_second, rel=0.02)
