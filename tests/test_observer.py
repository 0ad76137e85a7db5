"""What actors say of themselves is kept, also what they were asked for shortly before the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from deploy import ray_cluster
from deploy.observer import Observer, together
from system.config_file import parse
from system.timeline import Span
from tests.fakes import FakeTracker


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("ray")
    ray_cluster.connect(parse({"task": {"kind": "random_number"}, "output_dir": str(folder)}))
    yield
    ray_cluster.disconnect()


class Slow:
    """An actor that hands out one span a call, a while later."""

    def __init__(self, host: str, busy: float = 0.25) -> None:
        self.asked = 0
        self.host, self.busy = host, busy

    def stats(self) -> dict[str, float]:
        return {"busy": self.busy}

    def node(self) -> str:
        return self.host

    def spans(self) -> list[Span]:
        time.sleep(0.3)
        self.asked += 1
        return [Span("generate", "engine", self.asked, self.asked + 1)]


class Pool:
    def __init__(self) -> None:
        self.start("host 192.0.2.1 abc")

    def start(self, host: str) -> None:
        self.actor: Any = ray.remote(num_cpus=0)(Slow).remote(host)

    def named(self) -> dict[str, Any]:
        return {"sampler-0": self.actor}


def test_an_actor_that_is_made_again_is_said_to_be_where_it_is_now(connected: None) -> None:
    tracker, pool = FakeTracker(), Pool()
    observer = Observer((pool,), tracker, seconds=0.0)  # type: ignore[arg-type]
    deadline = time.monotonic() + 60
    for host in ("host 192.0.2.1 abc", "host 192.0.2.2 def"):
        while tracker.tagged.get("node.sampler-0") != host:
            assert time.monotonic() < deadline
            observer.look(1)
            time.sleep(0.1)
        pool.start("host 192.0.2.2 def")


def test_of_many_samplers_mlflow_gets_the_mean_and_the_extremes_and_of_few_each(
    connected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.observer.EACH_SAMPLER", 2)
    pool, learner, tracker = Pool(), Pool(), FakeTracker()
    busy = {"sampler-0": 0.1, "sampler-3": 0.2, "sampler-4": 0.6}
    actors = {name: ray.remote(num_cpus=0)(Slow).remote("host", share) for name, share in busy.items()}
    pool.named, learner.named = lambda: actors, lambda: {"learner": learner.actor}
    observer = Observer((learner, pool), tracker, seconds=0.5)  # type: ignore[arg-type]
    deadline = time.monotonic() + 60

    def look_until(name: str, points: int) -> None:
        while len(tracker.series(name)) < points:
            assert time.monotonic() < deadline
            observer.look(1)
            time.sleep(0.1)

    look_until("system/samplers/mean_busy", 3)
    last = {which: tracker.series(f"system/samplers/{which}_busy")[-1] for which in ("mean", "min", "max")}
    assert last == pytest.approx({"mean": 0.3, "min": 0.1, "max": 0.6})
    assert {name: round(observer.sampler_idle[name], 3) for name in busy} == {
        "sampler-0": 0.9, "sampler-3": 0.8, "sampler-4": 0.4,
    }  # fmt: skip
    named = {name for _, values in tracker.logged for name in values}
    assert "system/learner/busy" in named and not any(name.startswith("system/sampler-") for name in named)
    del actors["sampler-3"]
    look_until("system/sampler-4/busy", 1)


def test_what_a_sampler_does_not_say_counts_for_nothing() -> None:
    told = together([{"busy": 0.5, "canary_error": float("nan")}, {"busy": 0.25, "canary_error": 2.0, "gpu": 1.0}])
    assert {name: value for name, value in told.items() if name.startswith("mean")} == {
        "mean_busy": 0.375, "mean_canary_error": 2.0, "mean_gpu": 1.0,
    }  # fmt: skip
    assert together([{"canary_error": float("nan")}]) == {}


def test_no_span_is_lost_between_two_looks_or_before_the_end(connected: None) -> None:
    tracker = FakeTracker()
    observer = Observer((Pool(),), tracker, seconds=0.0)  # type: ignore[arg-type]
    deadline = time.monotonic() + 60
    while len(tracker.series("system/sampler-0/busy")) < 3:
        assert time.monotonic() < deadline
        observer.look(1)
        time.sleep(0.1)
    assert observer.sampler_idle == {"sampler-0": 0.75}
    assert tracker.tagged == {"node.sampler-0": "host 192.0.2.1 abc"}
    observer.look(2)
    starts = [span.start for span in observer.all_spans()["sampler-0"]]
    assert len(starts) > 2
    assert starts == list(range(1, len(starts) + 1))


def test_of_a_long_run_the_last_spans_of_all_processes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.observer.SPANS", 6)
    observer = Observer((), FakeTracker(), seconds=0.0)  # type: ignore[arg-type]
    for at in range(5):
        for name in ("driver", "learner"):
            observer.keep(name, [Span("work", "loop", at, at + 1)])
    kept = {name: [span.start for span in spans] for name, spans in observer.all_spans().items()}
    assert kept == {"driver": [2, 3, 4], "learner": [2, 3, 4]}
