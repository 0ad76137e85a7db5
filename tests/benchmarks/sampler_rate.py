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

from actors.settings import BLOCK, EngineSettings, engine_environment
from system.adapters import Adapter, BaseWeights
from system.config import Model
from system.constraints import Constraints
from system.models import locate
from system.scores import Scores
from system.trajectory import Behaviour, Prompt, Request, Trajectory
from tests.benchmarks.figures import Figure, in_turns, ratio, report
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


def random_adapter(base: BaseWeights, name: str, rng: np.random.Generator) -> Adapter:
    """Small random updates of all attention and MLP projections."""
    tensors = {}
    for weight, shape in base.shapes.items():
        module = f"base_model.model.{weight.removesuffix('.weight')}"
        if module.endswith("_proj"):
            out, in_ = shape
            tensors[f"{module}.lora_A.weight"] = rng.normal(0, 0.02, (RANK, in_)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.02, (out, RANK)).astype(np.float32)
    return Adapter.of(1, 1, tensors, {"r": RANK, "lora_alpha": 2.0 * RANK, "peft_type": "LORA"}, name)


def forget_prompts(engine: Any) -> None:
    """The next groups compute their prompts anew, as after an install."""
    engine._salt = str(time.perf_counter_ns())


class Nothing:
    tokens_forwarded = progress = 0

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        return Scores([np.zeros(len(trajectory) + 1) for trajectory in trajectories_K])


class Ours:
    """The sampler, with a version merged into its engine."""

    def __init__(self, folder: Path, dtype: Any, threads: int) -> None:
        from actors.engine import Engine
        from actors.sampler import Sampler

        constraints = Constraints.of(stop_token=2, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS, vocab_size=49152)
        settings = EngineSettings(max_model_len=128, dtype=dtype, threads=threads)
        self._adapter = random_adapter(BaseWeights(folder), "base", np.random.default_rng(0))
        self._sampler = Sampler(lambda: Engine(folder, "base", constraints, settings), Nothing())
        self._sampler.sample(Request(0, Prompt("first", (1,), (1,)), (Behaviour(),), seed=0), self._adapter)

    def rate(self, prompts: Sequence[Prompt], behaviours_K: tuple[Behaviour, ...]) -> float:
        requests = [Request(i, prompt, behaviours_K, seed=i) for i, prompt in enumerate(prompts)]
        forget_prompts(self._sampler._engine)
        started = time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as callers:
            groups = callers.map(lambda request: self._sampler.sample(request, self._adapter), requests)
            tokens = sum(group.tokens for group in groups)
        return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--groups", type=int, default=4, help=f"groups of {SAMPLES} samples in a measurement")
    arguments = parser.parse_args()
    # What a process starts with: the workers read it when they import torch.
    os.environ.update(engine_environment(arguments.threads, gpu=False))
    folder, rng = locate(Model()), np.random.default_rng(0)
    prompts = [Prompt(str(i), tuple(rng.integers(100, 40000, PROMPT_TOKENS).tolist()), (1,)) for i in range(arguments.groups)]
    with Worker(Bare, folder, arguments.dtype) as bare, Worker(Ours, folder, arguments.dtype, arguments.threads) as ours:
        runs = {"bare": lambda: bare("rate", prompts)}
        runs |= {name: lambda b=b: ours("rate", prompts, b) for name, b in BEHAVIOURS.items()}
        rates = in_turns(runs, arguments.repeats)
    what = {"dtype": arguments.dtype, "threads": arguments.threads, "sequences": arguments.groups * SAMPLES}
    for name in BEHAVIOURS:
        report(
            ratio(f"sampler over bare vLLM, tokens/s, {name}", rates[name], rates["bare"], 0.95, **what),
            Figure(f"sampler, {name}", "tokens/s", rates[name], detail=what),
        )
    report(Figure("bare vLLM", "tokens/s", rates["bare"], detail=what))


if __name__ == "__main__":
    main()
