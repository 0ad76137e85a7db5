"""Ray nodes on this machine, which join and are killed as those of a real cluster are, and take jobs as it does."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import psutil
from ray.cluster_utils import Cluster

from deploy import ray_cluster
from tests import tiny
from tests.fake_secrets import SECRETS

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    # By default Ray takes 15 s to notice that a node is gone; with these, two or three.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


@contextmanager
def cluster(head_cpus: int) -> Iterator[Cluster]:
    """A head; `add_node` and `remove_node` of what this gives do the rest. A node dies with the thread that added it, and Ray
    lets none but the main one."""
    with mock.patch.dict(os.environ, ENVIRONMENT):
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "include_dashboard": False})
        try:
            yield started
        finally:
            ray_cluster.disconnect()
            started.shutdown()


def without(hidden: Sequence[Path], kept: Sequence[Path], aside: Path) -> list[str]:
    """What to put in front of a command so that it sees `kept` alone of these folders, as on a machine with disks of its own.
    Nothing, and a line that says so, where this user may not; root may, outside of containers. `aside` is an empty folder in
    none of them."""
    steps = ["set -e", f"mount -t tmpfs tmpfs {aside}"]
    places = [(path, aside / str(number)) for number, path in enumerate(kept)]
    for path, place in places:
        steps += _bound(path, place, folder=path.is_dir())
    for name in (shlex.quote(str(folder)) for folder in hidden):
        steps += [f"mkdir -p {name}", f"mount -t tmpfs tmpfs {name}"]
    for path, place in places:
        steps += _bound(place, path, folder=path.is_dir())
    command = ["unshare", "--mount", "--propagation=private", "sh", "-c", "; ".join([*steps, 'exec "$@"']), "sh"]
    try:
        subprocess.run([*command, "true"], cwd="/", capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        # A container's root may not either. The tests hold all the same, on a filesystem that is shared.
        print(f"no folder can be hidden from the second node: {error} {getattr(error, 'stderr', '')}", file=sys.stderr)
        return []
    return command


def _bound(source: Path, target: Path, *, folder: bool) -> list[str]:
    """Shell commands after which `target`, made if need be, is `source`."""
    name, parent = (shlex.quote(str(path)) for path in (target, target.parent))
    make = f"mkdir -p {name}" if folder else f"mkdir -p {parent}; touch {name}"
    return [make, f"mount --bind {shlex.quote(str(source))} {name}"]


class TwoNodes:
    """A Ray cluster of two nodes on this machine, with a token. `programs` is the folder of the Python and the Ray that it runs
    with.

    No filesystem is shared, where this user may hide one: the second node sees neither the repository nor `folder`, but for the
    programs, the token and the model, which every node of a cluster has.
    """

    def __init__(self, folder: Path, programs: Path = Path(sys.executable).parent) -> None:
        self.folder, self.programs = folder, programs
        model = tiny.folder(folder)
        self.entry = [
            "python", "deploy/job.py", "deploy/configs/random_number.yaml", f"model.path={model}",
            "learner.warmup_steps=0", "sampler.samples_per_prompt=8", "sampler.kv_cache_mb=16", "lora.rank=4",
            "actors.count=2", "cluster.wait_seconds=60", f"tracking.uri=sqlite:///{folder}/mlflow.db",
        ]  # fmt: skip
        """Of a job with a tiny model. The head has room for the learner and one of its samplers."""
        self.environment = (
            os.environ
            | SECRETS
            | {
                "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            }
        )
        self.environment.pop("RAY_ADDRESS", None)
        (folder / "token").write_text("0123456789abcdef" * 4)
        ports = {"port": 26379, "dashboard-port": 28265, "ray-client-server-port": 21001}
        flags = [f"--{name}={port}" for name, port in ports.items()]
        # As on machines of their own: nodes that share a folder delete each other's copy of the job's working directory.
        self._temporary = [tempfile.TemporaryDirectory(prefix="node-", dir="/tmp") for _ in range(2)]
        # Short paths: there are sockets in them.
        self.temporary = [Path(folder.name) for folder in self._temporary]
        """What Ray writes, of each node."""
        flags = [*flags, f"--temp-dir={self.temporary[0]}"]
        self.nodes = [self._node("--head", "--num-cpus=2", "--dashboard-host=127.0.0.1", *flags)]
        while self.job("list").returncode:
            assert self.nodes[0].poll() is None, (folder / "node-0.txt").read_text()[-3000:]
            time.sleep(1)
        (aside := self.temporary[1] / "aside").mkdir()
        apart = without((ROOT, folder), (programs.parent, folder / "token", model), aside)
        self.apart = bool(apart)
        """The second node shares no filesystem."""
        flags = ["--address=127.0.0.1:26379", "--num-cpus=1", f"--temp-dir={self.temporary[1]}"]
        self.nodes.append(self._node(*flags, apart=apart))
        time.sleep(1)
        assert self.nodes[1].poll() is None, (folder / "node-1.txt").read_text()[-3000:]

    def _node(self, *flags: str, apart: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        log = (self.folder / f"node-{int('--head' not in flags)}.txt").open("w")
        # A free port for the agent: its default is taken where another test's Ray runs, and it takes no jobs then.
        command = [*apart, "ray", "start", "--block", "--dashboard-agent-listen-port=0", *flags]
        # Not in a folder that is hidden from it.
        return subprocess.Popen(
            command, cwd="/", env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def job(self, verb: str, *arguments: str, seconds: float = 280) -> subprocess.CompletedProcess[str]:
        """`ray job VERB …`, with all that it prints in stdout."""
        command = ["ray", "job", verb, "--address", "http://127.0.0.1:28265", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip

    def submit(self, *arguments: str, seconds: float = 280) -> subprocess.CompletedProcess[str]:
        """`ray job submit …`, once a node takes jobs."""
        deadline = time.monotonic() + 90
        while True:
            result = self.job("submit", *arguments, seconds=seconds)
            # The dashboard answers before the nodes' agents have joined it.
            if "No available agent" not in result.stdout or time.monotonic() > deadline:
                return result
            time.sleep(2)

    def close(self, *, at_once: bool = False) -> None:
        """`at_once`: by SIGKILL of every process, as when the machines go."""
        # `ray start --block` leaves its daemons to themselves when it is killed: end all that it started.
        started = [psutil.Process(node.pid) for node in self.nodes]
        processes = [*started, *(child for process in started for child in process.children(recursive=True))]
        # Ray ends workers by itself meanwhile.
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill() if at_once else process.terminate()
        for process in psutil.wait_procs(processes, timeout=20)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for folder in self._temporary:
            folder.cleanup()
