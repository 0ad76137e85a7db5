from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from deploy import stop as module
from deploy.stop import SIGNALS, Stop


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
