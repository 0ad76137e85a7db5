"""Addresses of clusters that are not there; test_pool.py and test_remote.py connect to real ones."""

from __future__ import annotations

import re
import time

import pytest

from deploy import ray_cluster
from system.config import ConfigError
from system.config_file import parse
from tests.servers import free_port


@pytest.fixture
def closed_port() -> int:
    return free_port()


def refused(address: str | None, message: str) -> None:
    began = time.monotonic()
    config = parse({"task": {"kind": "random_number"}, "cluster": {"address": address}})
    with pytest.raises(ConfigError, match=message):
        ray_cluster.connect(config)
    assert time.monotonic() - began < 15


def test_a_cluster_that_cannot_be_reached_is_named_within_seconds(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fix = "give the HOST:PORT that `ray start --head` printed, or leave it out"
    for address in (f"127.0.0.1:{closed_port}", f"[::1]:{closed_port}", "127.0.0.1:70000", "nonsense"):
        refused(address, rf"cluster\.address='{re.escape(address)}': Ray cannot join it \(.+\); {fix}")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    refused(None, rf"RAY_ADDRESS='127\.0\.0\.1:{closed_port}': Ray cannot join it \(.+\); {fix}")


def test_a_driver_beside_the_cluster_is_refused_with_the_way_there() -> None:
    refused("ray://127.0.0.1:10001", r"cluster\.address='ray://127\.0\.0\.1:10001'.+`ray job submit`")


def test_names_that_sound_like_a_secret_are_known() -> None:
    told = ["AWS_SECRET_ACCESS_KEY", "API_KEYS", "GOOGLE_CREDENTIALS", "HF_TOKEN", "HF_TOKEN_2", "MLFLOW_TRACKING_PASSWORD"]
    told += ["MY_SECRET", "PGPASS", "db_passwd"]
    others = ["RAY_JOB_STOP_WAIT_TIME_S", "PYTHONPATH", "KEYBOARD", "TOKENIZERS_PARALLELISM"]
    assert ray_cluster.secrets([*told, *others]) == sorted(told)
