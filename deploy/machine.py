"""A command that has the machine to itself: its config, and the process that it runs in."""

from __future__ import annotations

import os

from actors.settings import engine_environment
from system.config import Config


def alone(config: Config) -> Config:
    """For one process that shares the machine with nobody.

    Engine and learner, which mostly take turns, each get all cores, or as many as OMP_NUM_THREADS says.
    """
    # Once exported, another number does not reach all of vLLM's threads: its kernels then refuse to run.
    exported = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    cores = int(exported) if exported.isdecimal() else len(os.sched_getaffinity(0))
    update = {
        "actors": config.actors.model_copy(update={"cpus": max(cores, config.actors.threads)}),
        "learner": config.learner.model_copy(update={"threads": max(cores, config.learner.thread_count)}),
    }
    return config.model_copy(update=update)


def take_machine(config: Config) -> Config:
    """`alone`, with this process, which has not imported torch yet, made ready for an engine: on a GPU if there is one,
    whatever was reserved for the run."""
    config = alone(config)
    # OpenMP reads it when torch is imported.
    os.environ["OMP_NUM_THREADS"] = str(config.actors.threads)
    import torch

    gpu = torch.cuda.is_available()
    os.environ.update(engine_environment(config.actors.threads, gpu))
    update = {name: getattr(config, name).model_copy(update={"gpus": float(gpu)}) for name in ("actors", "learner")}
    return config.model_copy(update=update)
