from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import ray_cluster
from deploy import stop as module
from deploy.job import Job
from deploy.stop import SIGNALS, Stop
from system.config_file import parse
from system.run_error import RunError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def stop() -> Iterator[Stop]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = Stop()
    heard.hear()
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_loop_ends_the_run_at_once(stop: Stop, number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    signal.raise_signal(number)  # the same one, passed on


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_loop_is_a_request_and_the_same_one_passed_on_changes_nothing(
    stop: Stop, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    with stop.patient():
        assert not stop()
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop()
    assert caplog.text.count("stopping after this update, with a checkpoint") == 1


def test_who_asks_again_is_not_kept_waiting(stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_SECONDS", -1.0)
    with stop.patient(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_an_evaluation_in_the_loop_ends_at_once_and_the_loop_is_patient_again(stop: Stop) -> None:
    with stop.patient():
        with stop.patient(False), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop()


def test_a_run_that_is_cut_short_while_it_ends_still_leaves_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Tracker:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def artifact(self, *_: Any) -> None: ...

        def close(self, status: str) -> None:
            done.append(status)
            raise KeyboardInterrupt

    def refuse(*_: Any) -> None:
        raise RunError("no cluster")

    monkeypatch.setattr(
        "deploy.prepare.prepare", lambda _: types.SimpleNamespace(tokenizer=None, problem=types.SimpleNamespace(trained=()))
    )
    monkeypatch.setattr("system.tracking.Tracker", Tracker)
    monkeypatch.setattr(ray_cluster, "connect", refuse)
    monkeypatch.setattr(ray_cluster, "disconnect", lambda: done.append("disconnected"))
    job = Job(parse({"task": {"kind": "random_number"}}), tmp_path / "run", resume=False)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert done == ["FAILED", "disconnected"]


GOES_ON = """
import sys, time
from pathlib import Path
from deploy.stop import Stop

stop = Stop()
stop.hear()
with stop.patient():
    print("ready", flush=True)
    while not stop():
        time.sleep(0.01)
    print("stopping", flush=True)
    Path(sys.argv[1]).write_text(str(stop()))
"""


def test_a_terminal_that_hangs_up_is_a_request_and_what_is_written_to_it_no_error(tmp_path: Path) -> None:
    terminal, side = os.openpty()
    command = [sys.executable, "-c", GOES_ON, str(tmp_path / "asked")]
    with subprocess.Popen(command, stdout=side, stderr=side, cwd=ROOT) as child:
        os.close(side)
        assert os.read(terminal, 100).split() == [b"ready"]
        os.close(terminal)
        child.send_signal(signal.SIGHUP)
        assert child.wait(60) == 0
    assert (tmp_path / "asked").read_text() == "True"


def test_a_hangup_that_nohup_ignores_is_ignored() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop()
        stop.hear()
        signal.raise_signal(signal.SIGHUP)
        assert not stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
