"""The whole loop against the recipe of the paper's code, written from its description, on the same machine.

    python -m tests.benchmarks.original_recipe random_number [--settings ours|paper] [--seeds 0,1] [--limit 1800] [key=value …]
    python -m tests.benchmarks.original_recipe continuation [--repeats 5] [key=value …]

The recipe: one process; K rows with the whole prompt each; tokens drawn one at a time with a KV cache, gradients kept
through all steps; logits over the whole vocabulary; for a language-model reward a frozen pass over the padded rows;
sub-trajectory balance (lambda = 1) along each row; AdamW, no clipping; PEFT's own LoRA layer, in all layers. Support, K,
learning rate and LoRA's rank are ours; with `--settings paper` they are the paper's: the whole vocabulary, eight groups of 8 an
update, rank 512 on keys and values. `key=value` goes to our run alone.

`random_number`: seconds of training until the exact KL is at most 0.05; a recipe that is not there at the limit counts
with the limit, so the ratio is a lower bound. `continuation`: trajectories a second, with the mean lengths of both sides'
samples beside it (lengths fall in training, and the two are timed over different updates), and what the time goes to: shares of
our learner's time and of our sampler's, and of the recipe's one process's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.learner import Learner, lr_at
from learner.losses import States, subtrajectory_balance
from system import config_file, tasks
from system.config import Config
from system.functions import import_function
from system.models import locate
from system.posterior import Exact
from system.pretrained import load_tokenizer
from system.reward_config import FunctionReward
from system.text import decode
from system.timeline import Timeline
from system.trajectory import Group, Prompt
from tests.benchmarks.figures import ratio, report
from tests.benchmarks.plain import plain
from tests.benchmarks.runs import ALL_LAYERS, job

TARGET = 0.05


SETTINGS = {
    "ours": ["deploy/configs/random_number.yaml", "learner.steps=100000"],
    "paper": [
        "deploy/configs/random_number_paper.yaml", "sampler.samples_per_prompt=8", "learner.groups_per_update=8",
        "learner.steps=2560", "learner.final_lr=0", "lora={rank: 512, alpha: 32, targets: [k_proj, v_proj]}",
    ],
}  # fmt: skip


class Recipe:
    def __init__(self, cfg: Config) -> None:
        folder = locate(cfg.model)
        self.cfg = cfg
        self.tokenizer = load_tokenizer(folder)
        self.problem = tasks.build(cfg.task, self.tokenizer)
        self.constraints = self.problem.constraints
        self.learner = Learner(cfg, folder, self.constraints, cfg.model.path, self.problem.prompts[0].policy_tokens)
        self.model: Any = self.learner.policy.language_model.model
        self.rng = np.random.default_rng(cfg.seed)
        torch.manual_seed(cfg.seed)
        # The model's own output layer may be padded beyond the tokenizer's vocabulary.
        width = self.model.get_output_embeddings().weight.shape[0]
        self.closed_V = torch.full((width,), -torch.inf)
        self.closed_V[torch.from_numpy(self.constraints.columns)] = 0.0
        self.step = 0
        self.lengths: list[float] = []
        """Mean tokens of a sample, of each group."""
        self.timeline = Timeline()

    def rollout(self, prompt: Prompt, samples: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tokens [K, T], log q of them, log q(stop) [K, T + 1], lengths [K]), with gradients."""
        stop, longest = self.constraints.stop_token, self.constraints.max_tokens
        inputs = torch.tensor([prompt.policy_tokens]).expand(samples, -1)
        cache, active = None, torch.ones(samples, dtype=torch.bool)
        tokens, log_q, log_stop = [], [], []
        for depth in range(longest + 1):
            output = self.model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits_KV = output.logits[:, -1].float() + self.closed_V
            if depth < self.constraints.min_tokens:
                logits_KV[:, stop] = -torch.inf
            if depth == longest:
                logits_KV = torch.full_like(logits_KV, -torch.inf)
                logits_KV[:, stop] = 0.0
            log_KV = logits_KV.log_softmax(-1)
            with torch.no_grad():
                drawn = torch.multinomial((logits_KV / temperature).softmax(-1), 1)[:, 0]
                drawn = torch.where(active, drawn, stop)
            can_stop = depth >= self.constraints.min_tokens
            log_stop.append(torch.where(active & can_stop, log_KV[:, stop], 0.0) if can_stop else torch.zeros(samples))
            active = active & (drawn != stop)
            if depth < longest:
                tokens.append(drawn)
                log_q.append(torch.where(active, log_KV.gather(1, drawn[:, None])[:, 0], 0.0))
            if not active.any():
                break
            inputs = drawn[:, None]
        tokens_KT = torch.stack(tokens, 1)
        log_stop_KT = torch.stack(log_stop, 1)
        if log_stop_KT.shape[1] == tokens_KT.shape[1]:
            log_stop_KT = torch.nn.functional.pad(log_stop_KT, (0, 1))
        return tokens_KT, torch.stack(log_q, 1), log_stop_KT, (tokens_KT != stop).sum(1)

    @torch.no_grad()
    def log_reward(self, prompt: Prompt, tokens_KT: Tensor, lengths_K: Tensor) -> Tensor:
        """[K, T + 1]: at every prefix."""
        section = self.cfg.task.reward
        if isinstance(section, FunctionReward):
            function = import_function(section.path, "task.reward.path")
            values = torch.zeros(len(tokens_KT), tokens_KT.shape[1] + 1)
            for k, length in enumerate(lengths_K.tolist()):
                for t in range(length + 1):
                    prefix = tokens_KT[k, :t].tolist()
                    values[k, t] = function(prompt, decode(self.tokenizer, prefix), prefix) / section.beta
            return values
        rows = torch.cat([torch.tensor([prompt.reward_tokens]).expand(len(tokens_KT), -1), tokens_KT], 1)
        with self.learner.policy.base():
            log_KTV = self.model(rows, use_cache=False).logits[:, len(prompt.reward_tokens) - 1 :].float().log_softmax(-1)
        edges_KT = log_KTV[:, :-1].gather(2, tokens_KT[..., None])[..., 0]
        return torch.nn.functional.pad(edges_KT.cumsum(1), (1, 0)) + log_KTV[..., self.constraints.stop_token]

    def update(self) -> int:
        """Trajectories used. As there, the gradients of several groups add up, one after the other."""
        with plain(self.learner, attention=False):
            return self._update()

    def _update(self) -> int:
        learner, samples = self.learner, self.cfg.sampler.samples_per_prompt
        learner.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.cfg.learner.groups_per_update):
            loss = self.group_loss(samples)
            with self.timeline.span("backward", "recipe"):
                loss.backward()
        for group in learner.optimizer.param_groups:
            group["lr"] = lr_at(self.cfg.learner, self.step)
        learner.optimizer.step()
        self.step += 1
        return samples * self.cfg.learner.groups_per_update

    def group_loss(self, samples: int) -> Tensor:
        prompt = self.problem.prompts[self.rng.integers(len(self.problem.prompts))]
        tempered = self.cfg.task.kind == "continuation" and self.rng.random() < 0.5
        temperature = float(self.rng.uniform(0.5, 2.0)) if tempered else 1.0
        with self.timeline.span("rollout", "recipe"):
            tokens_KT, log_q_KT, log_stop_KT, lengths_K = self.rollout(prompt, samples, temperature)
        self.lengths.append(float(lengths_K.float().mean()))
        with self.timeline.span("reward", "recipe"):
            reward_KT = self.log_reward(prompt, tokens_KT, lengths_K) / self.cfg.learner.reward_temperature.at(self.step)
        at_T = torch.arange(reward_KT.shape[1])
        inside_KT = (at_T <= lengths_K[:, None]) & (at_T >= self.constraints.min_tokens)
        path_KT = torch.nn.functional.pad(log_q_KT.cumsum(1), (1, 0))
        u_KT = reward_KT - log_stop_KT - path_KT
        return subtrajectory_balance(States(u_KT, inside_KT, inside_KT, lengths_K), 1.0)

    def kl(self) -> float:
        problem = self.problem
        assert problem.outcomes is not None and problem.log_target_O is not None
        unknown = tuple(np.zeros(len(outcome) + 1) for outcome in problem.outcomes)
        (score,) = self.learner.score([Group(problem.prompts[0], problem.outcomes, unknown, 0, 0)])
        return Exact.of(score.log_q_K, problem.log_target_O).kl_target_q


def recipe_seconds(settings: str, seed: int, limit: float) -> tuple[float, float, int]:
    """(seconds of training until TARGET or the limit, KL then, updates); evaluations are not counted."""
    path, *overrides = SETTINGS[settings]
    recipe = Recipe(config_file.load(path, [f"seed={seed}", "learner.threads=2", *overrides]))
    seconds, kl = 0.0, math.inf
    while seconds < limit:
        started = time.perf_counter()
        for _ in range(5):
            recipe.update()
        seconds += time.perf_counter() - started
        kl = recipe.kl()
        print(f"recipe, seed {seed}: update {recipe.step}, {seconds:.0f} s, KL {kl:.4f}", file=sys.stderr, flush=True)
        if kl <= TARGET:
            break
    return seconds, kl, recipe.step


def our_seconds(seed: int, *overrides: str) -> float:
    """Seconds of training until TARGET, without those of evaluations, as the recipe's; infinite if it is not reached."""
    path = str(Path("deploy/configs/random_number.yaml").resolve())
    evaluations = job(path, f"seed={seed}", "learner.evaluate_every=5", *overrides).evaluations
    reached = [metrics["seconds_training"] for metrics in evaluations if metrics["exact/kl_target_q"] <= TARGET]
    return reached[0] if reached else math.inf


def random_number(settings: str, seeds: list[int], limit: float, overrides: list[str]) -> None:
    ours, theirs, details = [], [], []
    for seed in seeds:
        ours.append(our_seconds(seed, "learner.steps=60", *overrides))
        print(f"ours, seed {seed}: {ours[-1]:.1f} s", file=sys.stderr, flush=True)
        seconds, kl, updates = recipe_seconds(settings, seed, limit)
        theirs.append(seconds)
        details.append({"kl": round(kl, 4), "updates": updates, "seconds": round(seconds)})
    what = f"time to exact KL {TARGET} on random_number, original recipe (settings: {settings}) over ours"
    name = " ".join([what, *overrides])
    report(ratio(name, theirs, ours, 50.0, limit=limit, recipe=json.dumps(details), ours=json.dumps(ours)))


def continuation(repeats: int, overrides: list[str]) -> None:
    recipe = Recipe(
        config_file.load(
            "deploy/configs/continuation.yaml", ["sampler.samples_per_prompt=20", "learner.threads=2", *ALL_LAYERS]
        )
    )
    recipe.update()
    theirs, ours, lengths, phases = [], [], [], []
    path = str(Path("deploy/configs/continuation.yaml").resolve())
    for repeat in range(repeats):
        recipe.lengths.clear()
        recipe.timeline.drain()
        started = time.perf_counter()
        used = sum(recipe.update() for _ in range(3))
        whole = time.perf_counter() - started
        theirs.append(used / whole)
        settings = ["sampler.samples_per_prompt=20", "learner.steps=24", "task.limit=24", "learner.evaluation_samples=2"]
        run = job(path, f"seed={repeat}", *settings, *overrides)
        ours.append(run.summary["trajectories_per_second"])
        first, last = (run.evaluations[at]["posterior/length"] for at in (0, -1))
        lengths.append(f"{first:.1f} to {last:.1f} / {statistics.mean(recipe.lengths):.1f}")
        of_recipe: dict[str, float] = {}
        for span in recipe.timeline.drain():
            of_recipe[span.name] = of_recipe.get(span.name, 0.0) + (span.end - span.start) / whole
        phases.append(f"{_shares(run.shares())} / {_shares(of_recipe)}")
        rates = f"{ours[-1]:.2f} against {theirs[-1]:.2f} trajectories/s"
        print(f"repeat {repeat}: {rates}, {phases[-1]}", file=sys.stderr, flush=True)
    name = " ".join(["trajectories/s of the loop on continuation, K = 20, ours over the original recipe", *overrides])
    report(ratio(name, ours, theirs, 8.0, mean_lengths="; ".join(lengths), phases="; ".join(phases)))


def _shares(of: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in of.items() if share >= 0.005)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("random_number", "continuation"))
    parser.add_argument("--settings", choices=tuple(SETTINGS), default="ours", help="of the recipe on random_number")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that the recipe may train")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of our run")
    arguments = parser.parse_intermixed_args()
    if arguments.task == "random_number":
        random_number(arguments.settings, arguments.seeds, arguments.limit, arguments.overrides)
    else:
        continuation(arguments.repeats, arguments.overrides)
