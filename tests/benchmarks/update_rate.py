"""Seconds of one update on packed prefix trees against the same update on padded rows, in one process, in turns.

    python -m tests.benchmarks.update_rate [--repeats 5]

The padded update has the same policy, support, loss and optimizer, and, as its rows are no trees, torch's fused attention; each
sample is a row with the whole prompt in front.
Both give the same log q, which is checked first. Beside the ratio, how much of the arithmetic that this machine can do the
packed update does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from learner.baselines import Baseline
from learner.learner import Learner
from learner.losses import States
from system import config_file, tasks
from system.models import locate
from system.pretrained import load_tokenizer
from system.tasks.problem import Problem
from system.trajectory import Behaviour, Group, Prompt, Trajectory
from tests.benchmarks.figures import Figure, in_turns, ratio, report, seconds
from tests.benchmarks.runs import ALL_LAYERS
from tests.benchmarks.work import operations, peak

PROMPT_TOKENS = 60
MATRIX = 2048
"""Side of the product that gives the peak."""


class Padded:
    """An update as it is written without prefix trees."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.constraints = learner.constraints
        model = learner.policy.language_model.model
        self.decoder: Any = model.base_model
        head: Any = model.get_output_embeddings()
        self.head_CH = head.weight[torch.from_numpy(self.constraints.columns)]

    def log_q(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """([K, T] log q of each token, [K, T + 1] log q(stop) at each prefix), 0 in the padding."""
        prompt, samples = list(group.prompt.policy_tokens), [t.tokens_T.tolist() for t in group.trajectories_K]
        longest = max(map(len, samples))
        rows = torch.tensor([prompt + sample + [0] * (longest - len(sample)) for sample in samples])
        lengths_K = torch.tensor([len(sample) for sample in samples])
        mask = torch.arange(rows.shape[1]) < (len(prompt) + lengths_K)[:, None]
        hidden = self.decoder(input_ids=rows, attention_mask=mask.long(), use_cache=False).last_hidden_state
        logits_KTC = hidden[:, len(prompt) - 1 :] @ self.head_CH.T
        depth_T = np.arange(longest + 1)
        stop = self.constraints.stop_column
        closed_T = torch.from_numpy(~self.constraints.may_stop(depth_T))
        only_T = torch.from_numpy(self.constraints.must_stop(depth_T))
        logits_KTC[:, closed_T, stop] = -torch.inf
        log_KTC = logits_KTC.log_softmax(-1)
        columns = np.zeros((len(samples), longest), np.int64)
        for k, sample in enumerate(samples):
            columns[k, : len(sample)] = self.constraints.column_of(np.array(sample, np.int64))
        token_KT = log_KTC[:, :-1].gather(2, torch.from_numpy(columns)[..., None])[..., 0]
        inside_KT = torch.arange(longest) < lengths_K[:, None]
        stop_KT = torch.where(only_T | closed_T, 0.0, log_KTC[..., stop])
        return torch.where(inside_KT, token_KT, 0.0), stop_KT

    def update(self, group: Group) -> None:
        learner = self.learner
        learner.optimizer.zero_grad(set_to_none=True)
        token_KT, stop_KT = self.log_q(group)
        lengths = [len(t) for t in group.trajectories_K]
        reward = np.full((len(group), stop_KT.shape[1]), np.nan, np.float32)
        for k, values in enumerate(group.log_reward_K):
            reward[k, : len(values)] = values
        reward[:, ~self.constraints.may_stop(np.arange(reward.shape[1]))] = np.nan
        terminable = torch.from_numpy(np.isfinite(reward))
        path_KT = torch.nn.functional.pad(token_KT.cumsum(1), (1, 0))
        u_KT = torch.from_numpy(np.nan_to_num(reward)) - stop_KT - path_KT
        assert not isinstance(learner.objective, Baseline)
        learner.objective(States(u_KT, terminable, terminable, torch.tensor(lengths))).backward()
        torch.nn.utils.clip_grad_norm_(learner._parameters, 1.0)
        learner.optimizer.step()


def group_of(prompt: Prompt, samples: Sequence[Sequence[int]], rng: np.random.Generator) -> Group:
    trajectories = [
        Trajectory(np.array(s, np.int32), np.ones(len(s), bool), np.zeros(len(s) + 1, np.float32), "sampled", Behaviour())
        for s in samples
    ]
    return Group(prompt, tuple(trajectories), tuple(rng.normal(-5, 1, len(s) + 1) for s in samples), 0, 0)


def integers(problem: Problem, samples: int, rng: np.random.Generator) -> Group:
    """Uniform draws from the outcomes of random_number."""
    assert problem.outcomes is not None
    chosen = rng.integers(0, len(problem.outcomes), samples)
    return group_of(problem.prompts[0], [problem.outcomes[i].tokens_T.tolist() for i in chosen], rng)


def sentences(learner: Learner, problem: Problem, samples: int, rng: np.random.Generator) -> Group:
    """The model's own continuations of a prompt of PROMPT_TOKENS tokens, made of the task's prompts."""
    constraints = problem.constraints
    tokens = np.concatenate([prompt.policy_tokens for prompt in problem.prompts])[:PROMPT_TOKENS].tolist()
    outside = np.setdiff1d(np.arange(constraints.vocab_size), constraints.columns).tolist()
    torch.manual_seed(0)
    model: Any = learner.policy.language_model.model
    rows = model.generate(
        torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long), do_sample=True, top_k=0,
        num_return_sequences=samples, max_new_tokens=constraints.max_tokens, min_new_tokens=max(1, constraints.min_tokens),
        eos_token_id=constraints.stop_token, pad_token_id=constraints.stop_token, suppress_tokens=outside or None,
    )  # fmt: skip
    drawn = [row[len(tokens) :].tolist() for row in rows]
    cut = [row[: row.index(constraints.stop_token)] if constraints.stop_token in row else row for row in drawn]
    return group_of(Prompt("text", tuple(tokens), tuple(tokens)), cut, rng)


def check(learner: Learner, padded: Padded, group: Group) -> None:
    """Raises AssertionError unless both ways give the same log q."""
    with torch.no_grad():
        token_KT, stop_KT = padded.log_q(group)
    ends = torch.tensor([len(t) for t in group.trajectories_K])
    expected = token_KT.sum(1) + stop_KT.gather(1, ends[:, None])[:, 0]
    (score,) = learner.score([group])
    np.testing.assert_allclose(score.log_q_K, expected.numpy(), atol=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    for name, samples, wanted in (("random_number", 64, 8.0), ("continuation", 20, 3.0)):
        report(*measure(name, samples, wanted, repeats, rng))


def measure(name: str, samples: int, wanted: float, repeats: int, rng: np.random.Generator) -> list[Figure]:
    cfg = config_file.load(f"deploy/configs/{name}.yaml", ["learner.threads=2", *ALL_LAYERS])
    folder = locate(cfg.model)
    problem = tasks.build(cfg.task, load_tokenizer(folder))
    learner = Learner(cfg, folder, problem.constraints, cfg.model.path, problem.prompts[0].policy_tokens)
    group = integers(problem, samples, rng) if problem.outcomes else sentences(learner, problem, samples, rng)
    padded = Padded(learner)
    check(learner, padded, group)
    runs = {"padded": seconds(lambda: padded.update(group)), "packed": seconds(lambda: learner.update([group]))}
    times = in_turns(runs, repeats)
    longest = max(len(t) for t in group.trajectories_K)
    faster = ratio(
        f"update on {name}, K = {samples}, padded rows over packed trees", times["padded"], times["packed"], wanted,
        prompt_tokens=len(group.prompt.policy_tokens), longest_sample=longest,
        padded_tokens=samples * (len(group.prompt.policy_tokens) + longest),
        packed_tokens=int(learner.update([group])["tokens/forwarded"]),
    )  # fmt: skip
    top, work = peak(learner.policy.device, torch.float32, MATRIX), operations(learner, [group])
    share = [work / each / top for each in times["packed"]]
    about = {"operations": work, "operations_per_second_of_a_product": top}
    return [faster, Figure(f"update on {name}, packed: share of what a large matrix product reaches", "", share, detail=about)]


if __name__ == "__main__":
    main()
