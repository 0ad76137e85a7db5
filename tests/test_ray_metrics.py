"""The metrics as Prometheus reads them: from the port of a real Ray."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator

import pytest
import ray

from deploy import ray_cluster
from deploy.ray_metrics import RayMetrics
from system.config_file import parse

METRICS = {
    "loss": 0.25, "log_z": -3.5, "spread": float("nan"), "staleness": 1.5, "idle/learner": 0.125,
    "rate/trajectories_per_second": 7.5,
}  # fmt: skip


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Ray reads it when it starts; the default is 10 s.
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    ray_cluster.connect(parse({"task": {"kind": "random_number"}, "cluster": {"local_cpus": 2}}))
    yield
    ray_cluster.disconnect()


def exported() -> dict[tuple[str, str, str], float]:
    """(name, run, sampler) -> value of each of ours."""
    [node] = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    result = {}
    for line in lines:
        if match := re.fullmatch(r"(ray_headwater_\w+)\{(.*)\} (\S+)", line):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', match.group(2)))
            result[match.group(1), tags["run"], tags.get("sampler", "")] = float(match.group(3))
    return result


def test_a_runs_figures_are_on_rays_metrics_port(connected: None) -> None:
    metrics = RayMetrics("run-1")
    metrics.resume(100, 1)
    metrics.update(6, METRICS | {"loss": 9.0}, trajectories=110, deaths=1)
    metrics.update(7, METRICS, trajectories=124, deaths=3)
    metrics.sampler_idle("sampler-0", 0.5)
    wanted = {
        ("ray_headwater_step", "run-1", ""): 7.0,
        ("ray_headwater_loss", "run-1", ""): 0.25,
        ("ray_headwater_log_z_nats", "run-1", ""): -3.5,
        ("ray_headwater_staleness_updates", "run-1", ""): 1.5,
        ("ray_headwater_learner_idle_ratio", "run-1", ""): 0.125,
        ("ray_headwater_trajectories_per_second", "run-1", ""): 7.5,
        ("ray_headwater_sampler_idle_ratio", "run-1", "sampler-0"): 0.5,
        ("ray_headwater_trajectories_total", "run-1", ""): 24.0,
        ("ray_headwater_sampler_deaths_total", "run-1", ""): 2.0,
    }
    found: dict[tuple[str, str, str], float] = {}
    until = time.monotonic() + 60
    while found != wanted and time.monotonic() < until:
        time.sleep(1)
        try:
            found = exported()
        # The node's agent, which has the port, starts some seconds after Ray.
        except OSError:
            continue
    assert found == wanted
