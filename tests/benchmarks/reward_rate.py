"""log R at every prefix, with evidence: packed trees that go on from one reading of X, in turns with what they replace.

    python -m tests.benchmarks.reward_rate [--repeats 5] [--against rows passes]

`passes` are the T + 1 of the paper's code: the whole of X, the prefix, the stop and Y again for each prefix length, K rows at a
time; the output layer is computed behind X alone, which that code does not spare itself. `rows` are packed trees that have X in
each row. All give the same log R, which is checked first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.posterior_reward import Posterior
from system.config import Model
from system.language_model import LanguageModel
from system.models import locate
from system.pretrained import load_pretrained
from system.trajectory import Behaviour, Prompt, Trajectory
from tests.benchmarks.figures import Figure, in_turns, ratio, report, seconds

K, T, EVIDENCE, STOP = 16, 25, 20, 30
PROMPTS = (64, 256)
"""Tokens of X: a story's beginning; a question behind worked examples."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", nargs="+", choices=("rows", "passes"), default=["rows", "passes"])
    arguments = parser.parse_args()
    model = load_pretrained(locate(Model()), torch.float32, torch.device("cpu"))
    for prompt_tokens in PROMPTS:
        report(*measure(model, prompt_tokens, arguments.repeats, arguments.against))


class EachRow(LanguageModel):
    """Whose rows go on from nothing."""

    def read(self, tokens: Sequence[int]) -> None:
        return None


def measure(model: PreTrainedModel, prompt_tokens: int, repeats: int, against: list[str]) -> list[Figure]:
    rng = np.random.default_rng(0)
    reward, with_rows = Posterior(LanguageModel(model), (STOP,)), Posterior(EachRow(model), (STOP,))
    x, y = (tuple(rng.integers(100, 40000, n).tolist()) for n in (prompt_tokens, EVIDENCE))
    prompt = Prompt("p", x, x, evidence_tokens=y)
    samples = [rng.integers(100, 40000, T).astype(np.int32) for _ in range(K)]
    trajectories = [Trajectory(s, np.ones(T, bool), np.zeros(T + 1, np.float32), "sampled", Behaviour()) for s in samples]

    def packed() -> np.ndarray:
        return np.stack(reward.log_rewards(prompt, trajectories))

    def rows() -> np.ndarray:
        return np.stack(with_rows.log_rewards(prompt, trajectories))

    @torch.no_grad()
    def passes() -> np.ndarray:
        columns = []
        for t in range(T + 1):
            rows = torch.tensor([[*x, *sample[:t].tolist(), STOP, *y] for sample in samples])
            logits = model(rows, logits_to_keep=rows.shape[1] - prompt_tokens + 1).logits
            logp = logits[:, :-1].log_softmax(-1)
            columns.append(logp.gather(2, rows[:, prompt_tokens:, None])[..., 0].sum(1).numpy())
        return np.stack(columns, 1)

    others = {name: {"rows": rows, "passes": passes}[name] for name in against}
    expected = packed()
    for other in others.values():
        np.testing.assert_allclose(expected, other(), atol=5e-3)
    tokens = {
        "packed": reward.tokens_forwarded, "rows": with_rows.tokens_forwarded,
        "passes": sum(K * (prompt_tokens + t + 1 + EVIDENCE) for t in range(T + 1)),
    }  # fmt: skip
    times = in_turns({name: seconds(work) for name, work in {"packed": packed, **others}.items()}, repeats, warm_up=0)
    said = {"rows": "X in each row over X read once", "passes": "T + 1 passes over packed trees"}
    return [
        ratio(
            f"reward at every prefix, X = {prompt_tokens}, K = {K}, T = {T}, {EVIDENCE} tokens of evidence: {said[name]}",
            times[name], times["packed"], {"rows": None, "passes": 10.0}[name],
            packed_tokens=tokens["packed"], other_tokens=tokens[name],
        )
        for name in others
    ]  # fmt: skip


if __name__ == "__main__":
    main()
