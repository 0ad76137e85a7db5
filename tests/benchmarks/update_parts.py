"""What an update of `continuation`, prompts of 60 tokens, gains by the layers that are ours, and by adapting fewer of them.

    python -m tests.benchmarks.update_parts [--dtypes bfloat16 float32] [--samples 20 80] [--repeats 5]

In one process, in turns: the update as it is against the same one with torch's fused attention under a dense mask in place of
`tree_attention`'s, with PEFT's own layer in place of `LowRankLinear`, with both, and with `lora.layers=0.5`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from learner.learner import Learner
from system import config_file, tasks
from system.models import locate
from system.pretrained import load_tokenizer
from tests.benchmarks.figures import Figure, in_turns, ratio, report, seconds
from tests.benchmarks.plain import plain
from tests.benchmarks.runs import ALL_LAYERS
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
    cfg = config_file.load("deploy/configs/continuation.yaml", [f"learner.dtype={dtype}", *ALL_LAYERS])
    folder = locate(cfg.model)
    problem = tasks.build(cfg.task, load_tokenizer(folder))
    half = cfg.model_copy(update={"lora": cfg.lora.model_copy(update={"layers": 0.5})})
    learner, of_half = (
        Learner(settings, folder, problem.constraints, cfg.model.path, problem.prompts[0].policy_tokens)
        for settings in (cfg, half)
    )
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
    of_all, of_the_last = update(attention=False, lora=False), seconds(lambda: of_half.update([group]))
    times = in_turns(ways | {"ours": of_all, "half": of_the_last}, repeats)
    tokens = int(learner.update([group])["tokens/forwarded"])
    name = f"update on continuation, {tokens} tokens, in {dtype}"
    figures = [ratio(f"{name}, {way} over ours", times[way], times["ours"], None) for way in ways]
    return [*figures, ratio(f"{name}, all layers over the last half", times["ours"], times["half"], None)]


if __name__ == "__main__":
    main()
