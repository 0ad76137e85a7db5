"""Tracking against a server that fails by a plan: what was logged arrives whole, and the run never waits for it."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from system.config_file import parse
from system.journal import State
from system.tracking import Tracker, replay

Fate = Callable[[int], str]
"""What happens to the n-th request: `answer`; `refuse` with 503; `cut` the connection unheard; `forget` to acknowledge what
was done; `slow`."""


class FakeMLflow:
    """The part of MLflow's REST API that a run's records go through. Like MLflow's, its store keeps equal points once."""

    def __init__(self, fate: Fate) -> None:
        self.fate, self.requests = fate, itertools.count()
        self.points: set[tuple[str, int, int, float]] = set()
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.runs = 0
        self.status = "RUNNING"
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.handle(self, {key: value[0] for key, value in parse_qs(urlsplit(self.path).query).items()})

            def do_POST(self) -> None:
                outer.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def handle(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        fate = self.fate(next(self.requests))
        if fate == "slow":
            time.sleep(0.3)
        if fate == "cut":
            request.close_connection = True
            return
        code, answer = 503, {"error_code": "TEMPORARILY_UNAVAILABLE"}
        if fate != "refuse":
            with self._lock:
                code, answer = self.answer(urlsplit(request.path).path.split("/mlflow/")[-1], body)
        if fate == "forget":
            request.close_connection = True
            return
        data = json.dumps(answer).encode()
        request.send_response(code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def answer(self, call: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        info = {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "status": self.status, "lifecycle_stage": "active"}
        run = {"info": info | {"artifact_uri": "mlflow-artifacts:/1/r"}, "data": {}}
        match call:
            case "experiments/get-by-name":
                return 200, {"experiment": {"experiment_id": "1", "name": "x", "lifecycle_stage": "active"}}
            case "runs/search":
                return 200, {"runs": [run]} if self.runs else {}
            case "runs/create":
                self.runs += 1
            case "runs/log-batch":
                self.points |= {
                    (p["key"], int(p["step"]), int(p["timestamp"]), float(p["value"])) for p in body.get("metrics", ())
                }
                self.params |= {p["key"]: p["value"] for p in body.get("params", ())}
                self.tags |= {p["key"]: p["value"] for p in body.get("tags", ())}
                return 200, {}
            case "runs/set-tag":
                self.tags[body["key"]] = body["value"]
                return 200, {}
            case "runs/update":
                self.status = body["status"]
                return 200, {"run_info": info}
            case "runs/get":
                pass
            case _:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": call}
        return 200, {"run": run}


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[FakeMLflow]:
    server = FakeMLflow(request.param)
    yield server
    server.server.shutdown()
    server.server.server_close()


def by_chance(*fates: str) -> Fate:
    return lambda number: random.Random(number).choice(fates)


def with_gaps(number: int) -> str:
    """Down for the first requests, up for some, gone again, and back."""
    return "answer" if 6 <= number < 11 or number >= 20 else "cut"


PLANS = {
    "forgets to acknowledge": by_chance("answer", "forget"),
    "back with gaps": with_gaps,
    "all of it": by_chance("answer", "answer", "slow", "forget", "refuse", "cut"),
}


@pytest.mark.parametrize("served", PLANS.values(), ids=PLANS, indirect=True)
def test_all_arrives_once_however_the_server_fails_and_the_run_does_not_wait(tmp_path: Path, served: FakeMLflow) -> None:
    settings = {"uri": served.uri, "experiment": "x", "flush_seconds": 0.02, "close_seconds": 120}
    tracker = Tracker(tmp_path, parse({"task": {"kind": "random_number"}, "tracking": settings}))
    seconds = []
    for step in range(300):
        started = time.perf_counter()
        tracker.metrics({"loss": float(step), "ess": 0.5}, step)
        seconds.append(time.perf_counter() - started)
        time.sleep(0.002)
    tracker.tags({"note": "z"})
    tracker.close("FINISHED")
    assert (tracker.lag(), State.load(tmp_path / "tracking.json").refused) == (0, 0)
    assert statistics.median(seconds) < 0.02, "far less than the server's own time for one answer"
    assert sorted((name, step, value) for name, step, _, value in served.points) == sorted(
        [("loss", step, float(step)) for step in range(300)] + [("ess", step, 0.5) for step in range(300)]
    )
    assert served.runs == 1
    assert served.params["learner.lr"] == "0.001"
    assert (served.tags["note"], served.status) == ("z", "FINISHED")


@pytest.mark.parametrize("served", [lambda number: "cut" if number < 40 else "answer"], ids=["down"], indirect=True)
def test_what_a_dead_server_missed_is_sent_by_the_replay(tmp_path: Path, served: FakeMLflow) -> None:
    settings = {"uri": served.uri, "experiment": "x", "flush_seconds": 0.02, "close_seconds": 0.1}
    tracker = Tracker(tmp_path, parse({"task": {"kind": "random_number"}, "tracking": settings}))
    tracker.metrics({"loss": 1.0}, 0)
    tracker.close("FINISHED")
    assert tracker.lag() > 0
    attempts = 0
    while replay(tmp_path):
        attempts += 1
        assert attempts < 60
    assert [point[:2] for point in served.points] == [("loss", 0)]
    assert served.status == "FINISHED"
