"""Tokens a second of the sampler against transformers `generate`, bf16 both, in one process, in turns.

    python -m tests.benchmarks.generate_rate [--threads 2] [--repeats 5]

The sampler returns log-probs, respects the support and repeats its seeds; `generate` draws tokens alone.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from actors.engine import Engine
from actors.sampler import Sampler
from actors.settings import EngineSettings, engine_environment
from system.adapters import BaseWeights
from system.config import Model
from system.constraints import Constraints
from system.models import locate
from system.pretrained import load_pretrained
from system.trajectory import Behaviour, Prompt, Request
from tests.benchmarks.figures import in_turns, ratio, report, seconds
from tests.benchmarks.sampler_rate import NEW_TOKENS, PROMPT_TOKENS, SAMPLES, Nothing, forget_prompts, random_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = parser.parse_args()
    os.environ.update(engine_environment(arguments.threads, gpu=False))
    torch.set_num_threads(arguments.threads)
    folder, rng = locate(Model()), np.random.default_rng(0)
    constraints = Constraints.of(stop_token=2, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS, vocab_size=49152)
    # In bf16 the canary of a random adapter is off by more than an early version's: it is left out.
    settings = EngineSettings(
        max_model_len=128, dtype=arguments.dtype, threads=arguments.threads, max_num_seqs=256, kv_cache_mb=2048
    )
    sampler = Sampler(lambda: Engine(folder, "base", constraints, settings), Nothing())
    adapter = random_adapter(BaseWeights(folder), "base", rng)
    sampler.sample(Request(0, Prompt("first", (1,), (1,)), (Behaviour(),), seed=0), adapter)
    model: Any = load_pretrained(folder, getattr(torch, arguments.dtype), torch.device("cpu"))
    for batch in arguments.batches:
        texts = rng.integers(100, 40000, (batch // SAMPLES, PROMPT_TOKENS)).tolist()
        prompts = [Prompt(str(i), tuple(text), (1,)) for i, text in enumerate(texts)]
        rows = torch.tensor([prompt.policy_tokens for prompt in prompts]).repeat_interleave(SAMPLES, 0)

        def generate(rows: torch.Tensor = rows) -> None:
            model.generate(
                rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS, pad_token_id=2,
            )  # fmt: skip

        def sample(prompts: list[Prompt] = prompts) -> None:
            requests = [Request(i, prompt, (Behaviour(),) * SAMPLES, seed=i) for i, prompt in enumerate(prompts)]
            forget_prompts(sampler._engine)
            with ThreadPoolExecutor(len(requests)) as callers:
                list(callers.map(lambda request: sampler.sample(request, adapter), requests))

        times = in_turns({"generate": seconds(generate), "sampler": seconds(sample)}, arguments.repeats)
        name = f"sampler over transformers generate, tokens/s, {arguments.dtype}, batch {batch}, {NEW_TOKENS} new tokens"
        report(ratio(name, times["generate"], times["sampler"], 2.2, threads=arguments.threads))
    sampler.close()


if __name__ == "__main__":
    main()
