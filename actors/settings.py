"""What an engine is built with, and the environment that its process needs. Imports nothing heavy: the driver reads it too."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from system.config import Config

BLOCK = 32
"""Tokens of one block of the KV cache: the smallest that vLLM has on CPU. Shorter prefixes are not shared."""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has kernels for: up to the largest `lora.rank`."""


def max_lora_rank(rank: int) -> int:
    """vLLM's setting for adapters of this rank."""
    return next(known for known in _LORA_RANKS if known >= rank)


def engine_environment(threads: int, gpu: bool) -> dict[str, str]:
    """Environment variables of a process with an engine. vLLM and OpenMP read them when they are first imported."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # On a GPU the second runner is the default, and it takes no logits processor of the first one's interface.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    if not gpu:
        environment |= {
            # By default vLLM pins its threads and leaves out cores; a small machine has none to leave out.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            # Log-probs would start a C++ compiler at the first request, for a kernel that gains nothing here.
            "TORCH_COMPILE_DISABLE": "1",
        }
    return environment


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


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is built with, apart from the model and the support."""

    max_model_len: int
    """Longest prompt plus longest sample, tokens."""
    install: Literal["merged", "adapter"] = "merged"
    drain: bool = False
    """A version is installed when nothing is being drawn."""
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    """Of weights that are merged into bfloat16."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_num_seqs: int = 64
    enforce_eager: bool = True
    kv_cache_mb: int = 512
    gpu_memory_utilization: float = 0.5
    shares_gpu: bool = False
    """Others compute on its GPU. What they take while the engine starts it would count as its own, and leave its cache less."""
    canary_tolerance: float = 0.005
    """Nats a token."""
    canary_by_mean: bool = True
    """The mean of the canary's distances has to be within the tolerance; else their median."""
    max_lora_rank: int = 16
    threads: int = 1
    shared_prompts: int = 64
    """Prompts of which the last block is kept for the next request, so that it is computed once."""
    seed: int = 0
