"""GRPO on continuation: trajectories a second of sampling, reward and update, against TRL's trainer on the same machine.

    make setup-bench && python -m tests.benchmarks.grpo_rate [--repeats 5] [--steps 24]

Same model, prompts, K, LoRA, precision (float32), reward (log p(Z stop | X) of the base model), longest sample and stop
token; no KL penalty in either, since TRL has none by default. TRL generates with transformers, on both cores.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from system import config_file, tasks
from system.models import locate
from system.pretrained import load_pretrained, load_tokenizer
from tests.benchmarks.figures import ratio, report
from tests.benchmarks.runs import ALL_LAYERS, NO_REPLAY, ON_POLICY, job

SAMPLES, LIMIT, LR = 20, 24, 1e-6
CONFIG = "deploy/configs/continuation.yaml"
OVERRIDES = [
    f"sampler.samples_per_prompt={SAMPLES}", f"task.limit={LIMIT}", "loss.kind=grpo",
    *NO_REPLAY, *ON_POLICY, f"learner.lr={LR}", "learner.evaluation_samples=2", *ALL_LAYERS,
    "learner.reward_temperature={start: 1, end: 1, horizon: 0}",
]  # fmt: skip


def trl_rates(steps: int, seed: int) -> tuple[float, float]:
    """(trajectories a second after the first step, mean length in tokens)."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    # In the extra `bench` alone: nothing else of the project needs them.
    datasets, trl = (importlib.import_module(name) for name in ("datasets", "trl"))
    cfg = config_file.load(CONFIG, OVERRIDES)
    folder = locate(cfg.model)
    tokenizer = load_tokenizer(folder)
    problem = tasks.build(cfg.task, tokenizer)
    stop = problem.constraints.stop_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    tokenizer.pad_token = tokenizer.eos_token
    model, base = (load_pretrained(folder, torch.float32, torch.device("cpu")) for _ in range(2))
    model.config.eos_token_id = model.generation_config.eos_token_id = stop
    times: list[float] = []
    lengths: list[int] = []

    @torch.no_grad()
    def log_reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        prompt = tokenizer(prompts[0])["input_ids"]
        lengths.extend(len(ids) for ids in completion_ids)
        samples = [ids if ids[-1] == stop else [*ids, stop] for ids in completion_ids]
        longest = max(map(len, samples))
        rows = torch.tensor([prompt + ids + [stop] * (longest - len(ids)) for ids in samples])
        log_q = base(rows, logits_to_keep=longest + 1).logits[:, :-1].log_softmax(-1)
        token_log_q = log_q.gather(2, rows[:, len(prompt) :, None])[..., 0]
        inside = torch.arange(longest) < torch.tensor([len(ids) for ids in samples])[:, None]
        return (token_log_q * inside).sum(1).tolist()

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    texts = [str(tokenizer.decode(list(prompt.policy_tokens))) for prompt in problem.prompts]
    with tempfile.TemporaryDirectory() as output:
        trl.GRPOTrainer(
            model=model,
            reward_funcs=log_reward,
            args=trl.GRPOConfig(
                output_dir=output, max_steps=steps, per_device_train_batch_size=SAMPLES, num_generations=SAMPLES,
                max_completion_length=cfg.task.max_tokens, temperature=1.0, beta=0.0, learning_rate=LR, use_cpu=True,
                bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no", seed=seed,
                generation_kwargs={"eos_token_id": stop, "top_k": 0}, disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": texts * (1 + steps // len(texts))}),
            processing_class=tokenizer,
            callbacks=[Clock()],
            peft_config=LoraConfig(
                r=cfg.lora.rank, lora_alpha=int(cfg.lora.alpha), target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        ).train()  # fmt: skip
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return SAMPLES * len(seconds) / sum(seconds), statistics.mean(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    ours, theirs, lengths = [], [], []
    for repeat in range(arguments.repeats):
        rate, length = trl_rates(max(3, arguments.steps // 4), repeat)
        theirs.append(rate)
        run = job(str(Path(CONFIG).resolve()), f"seed={repeat}", f"learner.steps={arguments.steps}", *OVERRIDES)
        ours.append(run.summary["trajectories_per_second"])
        lengths.append(f"{run.evaluations[-1]['posterior/length']:.1f} / {length:.1f}")
        print(f"repeat {repeat}: {ours[-1]:.2f} against {rate:.2f} trajectories/s", file=sys.stderr, flush=True)
    name = f"GRPO on continuation, trajectories/s, K = {SAMPLES}, ours over TRL with transformers"
    report(ratio(name, ours, theirs, 3.0, mean_lengths="; ".join(lengths)))


if __name__ == "__main__":
    main()
