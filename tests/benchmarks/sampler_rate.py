"""Tokens a second of the sampler against bare `vllm.LLM.generate`, in one process, in turns, on the same engine.

    python -m tests.benchmarks.sampler_rate [--dtype bfloat16] [--threads 2] [--repeats 5]

The bare run asks vLLM for tokens alone. The sampler's has log-probs, seeds, the support and the behaviours in every
request, a reward that costs nothing, and one caller for each group. Ends with one line of JSON. On a shared machine the
ratio of CPU seconds, with one thread, is steadier than that of the rates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from actors.engine import Engine
from actors.sampler import Sampler
from actors.settings import EngineSettings, engine_environment
from system.adapters import Adapter, BaseWeights
from system.config import Model
from system.constraints import Constraints
from system.models import locate
from system.trajectory import Behaviour, Prompt, Request, Trajectory

NEW_TOKENS, PROMPT_TOKENS, SAMPLES, RANK = 32, 40, 16, 16
BEHAVIOURS = {
    "on_policy": (Behaviour(),) * SAMPLES,
    "exploring": (Behaviour(),) * (SAMPLES // 2) + (Behaviour(1.3, 0.1),) * (SAMPLES // 2),
}


class Nothing:
    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> list[np.ndarray]:
        return [np.zeros(len(trajectory) + 1) for trajectory in trajectories_K]


def random_adapter(base: BaseWeights, name: str, rng: np.random.Generator) -> Adapter:
    """Small random updates of all attention and MLP projections."""
    tensors = {}
    for weight, (out, in_) in base.matrices().items():
        module = f"base_model.model.{weight.removesuffix('.weight')}"
        if module.endswith("_proj"):
            tensors[f"{module}.lora_A.weight"] = rng.normal(0, 0.02, (RANK, in_)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.02, (out, RANK)).astype(np.float32)
    return Adapter.publish(1, 1, tensors, {"r": RANK, "lora_alpha": 2.0 * RANK, "peft_type": "LORA"}, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--groups", type=int, default=8, help=f"groups of {SAMPLES} samples in a measurement")
    arguments = parser.parse_args()
    os.environ.update(engine_environment(arguments.threads, gpu=False))
    import vllm

    folder = locate(Model())
    constraints = Constraints.of(stop_token=2, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS, vocab_size=49152)
    engine = Engine(
        folder, "base", constraints, EngineSettings(max_model_len=128, dtype=arguments.dtype, threads=arguments.threads)
    )
    rng = np.random.default_rng(0)
    adapter = random_adapter(BaseWeights(folder), "base", rng)
    sampler = Sampler(engine, Nothing())
    install = sampler.install(adapter)
    prompts = [Prompt(str(i), tuple(rng.integers(100, 40000, PROMPT_TOKENS).tolist()), (1,)) for i in range(arguments.groups)]

    def bare() -> int:
        params = vllm.SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": list(prompt.policy_tokens)} for prompt in prompts for _ in range(SAMPLES)]
        outputs = engine._llm.generate(inputs, params, use_tqdm=False)  # type: ignore[arg-type]
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def sampled(behaviours_K: tuple[Behaviour, ...]) -> int:
        requests = [Request(i, prompt, behaviours_K, seed=i) for i, prompt in enumerate(prompts)]
        with ThreadPoolExecutor(len(requests)) as callers:
            return sum(group.tokens for group in callers.map(lambda request: sampler.sample(request, adapter), requests))

    runs = {"bare": bare} | {name: lambda b=b: sampled(b) for name, b in BEHAVIOURS.items()}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, run in runs.items():
            engine._forget_prefixes()
            started, cpu_started = time.perf_counter(), time.process_time()
            tokens = run()
            rate, cpu = tokens / (time.perf_counter() - started), time.process_time() - cpu_started
            # The first round warms up caches and thread pools.
            if repeat:
                rates[name].append(rate)
                cpu_seconds[name].append(cpu)
                print(f"repeat {repeat}: {name:10s} {rate:7.1f} tokens/s, {cpu:6.2f} CPU seconds", flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: round(median[name] / median["bare"], 3) for name in BEHAVIOURS}
    cpu = {name: statistics.median(values) for name, values in cpu_seconds.items()}
    sampler.close()
    print(
        json.dumps({
            "tokens_per_second": {name: round(value, 1) for name, value in median.items()},
            "ratio_to_bare": ratios,
            "cpu_ratio_to_bare": {name: round(cpu["bare"] / cpu[name], 3) for name in BEHAVIOURS},
            "install_seconds": round(install["seconds"], 3),
            "dtype": arguments.dtype,
            "threads": arguments.threads,
            "sequences": arguments.groups * SAMPLES,
            "repeats": arguments.repeats,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
