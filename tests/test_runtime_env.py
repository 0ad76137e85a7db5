"""A job that installs its packages itself, on nodes that have none but Ray, as deploy/cluster/README.md says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nodes import ROOT, TwoNodes

PACKAGES = "--extra-index-url=https://download.pytorch.org/whl/cpu"
"""Where the page has PyTorch's builds from."""


def environment_of_the_page() -> dict[str, object]:
    page = (ROOT / "deploy/cluster/README.md").read_text()
    (text,) = [text for text in re.findall(r"--runtime-env-json '(.+?)'", page, re.DOTALL) if '"pip"' in text]
    assert PACKAGES in text
    # This machine may have a folder of wheels in its place, as the Makefile asks pip.
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    folder = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return json.loads(text.replace(PACKAGES, f"--find-links={folder}") if folder else text)


def only_ray(folder: Path) -> Path:
    """The programs of a new environment that has Ray, of the version in requirements/cpu.txt, and what Ray needs."""
    pinned = re.findall(r"^ray(?:\[\w+\])?==(\S+)", (ROOT / "requirements/cpu.txt").read_text(), re.MULTILINE)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    programs = folder / "bin"
    uv = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--quiet", "--python", str(programs / "python")]
    subprocess.run([*uv, "pip", f"ray[default]=={pinned[0]}"], check=True)
    return programs


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_job_installs_its_packages_on_nodes_that_have_none_but_ray(tmp_path: Path) -> None:
    programs = only_ray(tmp_path / "environment")
    packages = subprocess.run([str(programs / "python"), "-c", "import torch"], capture_output=True, check=False)
    assert packages.returncode, "the nodes have PyTorch already"
    cluster = TwoNodes(tmp_path, programs)
    try:
        result = cluster.submit(
            "--working-dir", ".", "--runtime-env-json", json.dumps(environment_of_the_page()), "--", *cluster.entry,
            "learner.steps=4", "actors.start_seconds=1500", f"output_dir={tmp_path}/runs", seconds=1500,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-3000:]
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert json.loads((run_dir / "summary.json").read_text())["finished"] is True
    finally:
        cluster.close()
