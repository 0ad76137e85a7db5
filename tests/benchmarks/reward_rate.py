"""log R at every prefix, with evidence: one packed pass against T + 1 passes over padded rows, in turns.

    python -m tests.benchmarks.reward_rate [--repeats 5]

The T + 1 passes are those of the paper's code: the whole of X, the prefix, the stop and Y again for each prefix length, K
rows at a time. Both give the same log R, which is checked first.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.rewards import Posterior
from system.config import Model
from system.language_model import LanguageModel, load_pretrained
from system.models import locate
from system.trajectory import Behaviour, Prompt, Trajectory
from tests.benchmarks.figures import Figure, in_turns, ratio, report, seconds

K, T, EVIDENCE, STOP = 16, 25, 20, 30
PROMPTS = (64, 256)
"""Tokens of X: a story's beginning; a question behind worked examples."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    model = load_pretrained(locate(Model()), torch.float32, torch.device("cpu"))
    for prompt_tokens in PROMPTS:
        report(measure(model, prompt_tokens, repeats))


def measure(model: PreTrainedModel, prompt_tokens: int, repeats: int) -> Figure:
    rng = np.random.default_rng(0)
    reward = Posterior(LanguageModel(model), (STOP,))
    x, y = (tuple(rng.integers(100, 40000, n).tolist()) for n in (prompt_tokens, EVIDENCE))
    prompt = Prompt("p", x, x, evidence_tokens=y)
    samples = [rng.integers(100, 40000, T).astype(np.int32) for _ in range(K)]
    trajectories = [Trajectory(s, np.ones(T, bool), np.zeros(T + 1, np.float32), "sampled", Behaviour()) for s in samples]

    def packed() -> np.ndarray:
        return np.stack(reward.score(prompt, trajectories))

    @torch.no_grad()
    def passes() -> np.ndarray:
        columns = []
        for t in range(T + 1):
            rows = torch.tensor([[*x, *sample[:t].tolist(), STOP, *y] for sample in samples])
            logp = model(rows).logits[:, prompt_tokens - 1 : -1].log_softmax(-1)
            columns.append(logp.gather(2, rows[:, prompt_tokens:, None])[..., 0].sum(1).numpy())
        return np.stack(columns, 1)

    np.testing.assert_allclose(packed(), passes(), atol=5e-3)
    reward.tokens_forwarded = 0
    packed()
    tokens = reward.tokens_forwarded
    times = in_turns({"passes": seconds(passes), "packed": seconds(packed)}, repeats, warm_up=0)
    return ratio(
        f"reward at every prefix, X = {prompt_tokens}, K = {K}, T = {T}, {EVIDENCE} tokens of evidence: T + 1 passes over one",
        times["passes"], times["packed"], 10.0,
        packed_tokens=tokens, padded_tokens=sum(K * (prompt_tokens + t + 1 + EVIDENCE) for t in range(T + 1)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
