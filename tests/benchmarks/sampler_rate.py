"""Tokens a second of the sampler against bare `vllm.LLM.generate`, in turns, each in a process of its own.

    python -m tests.benchmarks.sampler_rate [--dtype bfloat16] [--threads 2] [--repeats 5]

The bare engine has vLLM's own scheduler and nothing of ours, and is asked for tokens alone. The sampler's has log-probs, seeds,
the support and the behaviours in every request, a reward that costs nothing, and one caller for each group. Both share prompts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from actors.engine import Engine
from actors.sampler import Sampler
from actors.settings import BLOCK, EngineSettings, engine_environment
from system.adapters import Adapter, BaseWeights
from system.config import Model
from system.constraints import Constraints
from system.models import locate
from system.trajectory import Behaviour, Prompt, Request, Trajectory
from tests.benchmarks.figures import in_turns, ratio, report
from tests.benchmarks.worker import Worker

NEW_TOKENS, PROMPT_TOKENS, SAMPLES, RANK = 32, 40, 16, 16
BEHAVIOURS = {
    "on_policy": (Behaviour(),) * SAMPLES,
    "exploring": (Behaviour(),) * (SAMPLES // 2) + (Behaviour(1.3, 0.1),) * (SAMPLES // 2),
}


class Bare:
    """vLLM alone."""

    def __init__(self, folder: Path, dtype: Any) -> None:
        import vllm

        # Its best on CPU: nothing is compiled, and prompts are cached, in blocks that are not longer than they are.
        self._llm = vllm.LLM(
            str(folder), skip_tokenizer_init=True, dtype=dtype, max_model_len=128, max_num_seqs=64, enforce_eager=True,
            enable_prefix_caching=True, block_size=BLOCK, kv_cache_memory_bytes=512 << 20,
        )  # fmt: skip

    def rate(self, prompts: Sequence[Prompt]) -> float:
        """Of SAMPLES for each prompt."""
        import vllm

        self._llm.reset_prefix_cache()
        params = vllm.SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        inputs: Any = [{"prompt_token_ids": list(prompt.policy_tokens)} for prompt in prompts for _ in range(SAMPLES)]
        started = time.perf_counter()
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - started)


class Nothing:
    tokens_forwarded = progress = 0

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> list[np.ndarray]:
        return [np.zeros(len(trajectory) + 1) for trajectory in trajectories_K]


def random_adapter(base: BaseWeights, name: str, rng: np.random.Generator) -> Adapter:
    """Small random updates of all attention and MLP projections."""
    tensors = {}
    for weight, shape in base.shapes.items():
        module = f"base_model.model.{weight.removesuffix('.weight')}"
        if module.endswith("_proj"):
            out, in_ = shape
            tensors[f"{module}.lora_A.weight"] = rng.normal(0, 0.02, (RANK, in_)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.02, (out, RANK)).astype(np.float32)
    return Adapter.publish(1, 1, tensors, {"r": RANK, "lora_alpha": 2.0 * RANK, "peft_type": "LORA"}, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--groups", type=int, default=4, help=f"groups of {SAMPLES} samples in a measurement")
    arguments = parser.parse_args()
    # What a process starts with: the child reads it when it imports vLLM.
    os.environ.update(engine_environment(arguments.threads, gpu=False))
    folder = locate(Model())
    constraints = Constraints.of(stop_token=2, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS, vocab_size=49152)
    engine = Engine(
        folder, "base", constraints, EngineSettings(max_model_len=128, dtype=arguments.dtype, threads=arguments.threads)
    )
    rng = np.random.default_rng(0)
    adapter = random_adapter(BaseWeights(folder), "base", rng)
    sampler = Sampler(engine, Nothing())
    sampler.install(adapter)
    prompts = [Prompt(str(i), tuple(rng.integers(100, 40000, PROMPT_TOKENS).tolist()), (1,)) for i in range(arguments.groups)]

    def rate(behaviours_K: tuple[Behaviour, ...]) -> float:
        requests = [Request(i, prompt, behaviours_K, seed=i) for i, prompt in enumerate(prompts)]
        engine._forget_prefixes()
        started = time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as callers:
            tokens = sum(group.tokens for group in callers.map(lambda request: sampler.sample(request, adapter), requests))
        return tokens / (time.perf_counter() - started)

    with Worker(Bare, folder, arguments.dtype) as bare:
        runs = {"bare": lambda: bare("rate", prompts)} | {name: lambda b=b: rate(b) for name, b in BEHAVIOURS.items()}
        rates = in_turns(runs, arguments.repeats)
    sampler.close()
    what = {"dtype": arguments.dtype, "threads": arguments.threads, "sequences": arguments.groups * SAMPLES}
    for name in BEHAVIOURS:
        report(ratio(f"sampler over bare vLLM, tokens/s, {name}", rates[name], rates["bare"], 0.95, **what))


if __name__ == "__main__":
    main()
