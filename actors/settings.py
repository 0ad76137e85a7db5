"""What an engine is built with, and the environment that its process needs. Imports nothing heavy: the driver reads it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
