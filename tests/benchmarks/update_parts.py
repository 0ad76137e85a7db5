"""What an update of `continuation`, prompts of 60 tokens, gains by the layers that are ours, in one process, in turns.

    python -m tests.benchmarks.update_parts [--dtypes bfloat16 float32] [--samples 20 80] [--repeats 5]

The update as it is against the same one with torch's fused attention under a dense mask in place of `tree_attention`'s, with
PEFT's own layer in place of `LowRankLinear`, and with both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from learner.learner import Learner
from system import config_file, tasks
from system.language_model import load_tokenizer
from system.models import locate
from tests.benchmarks.figures import Figure, in_turns, ratio, report, seconds
from tests.benchmarks.plain import plain
from tests.benchmarks.update_rate import sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--samples", nargs="+", type=int, default=[20, 80])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for dtype in arguments.dtypes:
        for samples in arguments.samples:
            report(*measure(dtype, samples, arguments.repeats))


def measure(dtype: str, samples: int, repeats: int) -> list[Figure]:
    cfg = config_file.load("deploy/configs/continuation.yaml", [f"learner.dtype={dtype}"])
    folder = locate(cfg.model)
    problem = tasks.build(cfg.task, load_tokenizer(folder))
    learner = Learner(cfg, folder, problem.constraints, cfg.model.path, problem.prompts[0].policy_tokens)
    group = sentences(learner, problem, samples, np.random.default_rng(0))

    def update(*, attention: bool, lora: bool) -> Callable[[], float]:
        def run() -> None:
            with plain(learner, attention=attention, lora=lora):
                learner.update([group])

        return seconds(run)

    ways = {
        "torch's fused attention": update(attention=True, lora=False),
        "PEFT's layer": update(attention=False, lora=True),
        "both": update(attention=True, lora=True),
    }
    times = in_turns(ways | {"ours": update(attention=False, lora=False)}, repeats)
    tokens = int(learner.update([group])["tokens/forwarded"])
    name = f"update on continuation, {tokens} tokens, in {dtype}"
    return [ratio(f"{name}, {way} over ours", times[way], times["ours"], None) for way in ways]


if __name__ == "__main__":
    main()
