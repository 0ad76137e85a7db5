"""The benchmark suite: every figure with its spread, as a table and as MLflow runs.

    python -m tests.benchmarks [NAME | "NAME argument …" … | all]

Each benchmark runs in a process of its own, on a machine that should be doing nothing else. Without names all run but
those that take many minutes, which are in `LONG`, and those of `GPU`; `all` takes hours. A name with arguments runs with these
alone.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import mlflow
import torch

from system.config import Tracking
from system.tracking_uri import resolve_uri
from tests.benchmarks.figures import Figure, table

QUICK = [
    "sampler_rate --threads 1",
    "sampler_rate --threads 2 --dtype bfloat16",
    "update_rate",
    "update_parts",
    "allocator_rate",
    "update_memory",
    "rank_rate",
    "publish",
    "agreement float32",
    "agreement bfloat16",
    "driver_rate",
]
LONG = [
    "grpo_rate",
    "generate_rate",
    "reward_rate",
    "publish_share",
    "install_modes",
    "original_recipe random_number",
    "original_recipe random_number --settings paper --limit 2400",
    "original_recipe continuation",
    "plan_check",
    "ablation random_number",
    "ablation continuation",
]
GPU = ["gpu_update"]
"""Where there is one."""


def run(command: str) -> list[Figure]:
    """The figures that a benchmark printed. Raises CalledProcessError if it failed."""
    print(f"== {command}", flush=True)
    name, *arguments = shlex.split(command)
    figures = []
    with subprocess.Popen(
        [sys.executable, "-m", f"tests.benchmarks.{name}", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith('{"name"'):
                figures.append(Figure(**json.loads(line)))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return figures


def log(figures: list[Figure]) -> None:
    mlflow.set_tracking_uri(resolve_uri(Tracking().uri))
    mlflow.set_experiment("headwater-benchmarks")
    for figure in figures:
        with mlflow.start_run(run_name=figure.name):
            mlflow.log_params({"wanted": figure.wanted, "unit": figure.unit} | figure.detail)
            for repeat, value in enumerate(figure.values):
                mlflow.log_metric("value", value, step=repeat)
            spread = {"median": figure.median, "least": min(figure.values), "largest": max(figure.values)}
            mlflow.log_metrics(spread | {"reached": float(figure.reached)})


def chosen(names: list[str]) -> list[str]:
    """The commands that are asked for, in their order; exits where there is no such benchmark."""
    known: dict[str, list[str]] = {}
    for command in QUICK + LONG + GPU:
        known.setdefault(command.split()[0], []).append(command)
    if not names:
        return QUICK
    if names == ["all"]:
        return QUICK + LONG + (GPU if torch.cuda.is_available() else [])
    if unknown := [name for name in names if name.split()[0] not in known]:
        sys.exit(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(known)}")
    return [command for name in names for command in ([name] if " " in name else known[name])]


def main(names: list[str]) -> None:
    figures, failed = [], []
    for command in chosen(names):
        try:
            found = run(command)
        # One that fails costs none of the others.
        except subprocess.CalledProcessError as error:
            failed.append(str(error))
            continue
        # After each, so that an interruption costs no figure either.
        log(found)
        figures += found
    print(table(figures))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
