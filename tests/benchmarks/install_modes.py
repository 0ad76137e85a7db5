"""The ways a version enters the engine, merged into the base weights or as an adapter beside them, side by side.

    python -m tests.benchmarks.install_modes [--dtypes float32 bfloat16] [--repeats 5]

Each engine lives in a process of its own; they are measured in turns. Tokens a second are over an engine of the same
precision that never had a version. The update is Adam's first on a text, scaled to a size (rms over all weights); what
arrives is measured on another text: how much of the change of its log-probs under the learner (float32) the engine shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actors.settings import EngineSettings, engine_environment
from system.adapters import Adapter, Canary
from system.config import Model
from system.models import locate
from tests.benchmarks.figures import Figure, in_turns, ratio, report
from tests.benchmarks.sampler_rate import forget_prompts
from tests.benchmarks.worker import Worker

if TYPE_CHECKING:
    from actors.engine import Installed

NEW_TOKENS, PROMPT_TOKENS, SAMPLES, PROMPTS = 32, 40, 16, 4
CONTEXT = 992
"""Most tokens of the text whose log-probs are compared."""
SIZES = (1e-5, 1e-4, 1e-3)
MODES: dict[str, dict[str, Any]] = {
    "base": {"install": "merged"},
    "merged": {"install": "merged", "rounding": "nearest"},
    "merged, stochastic rounding": {"install": "merged", "rounding": "stochastic"},
    "adapter": {"install": "adapter"},
}
TEXTS = Path("system/tasks")


# ------------------------------------------------------------------------------------------ in an engine's process


class Drawing:
    """An engine, and what is measured of it."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        from actors.engine import Engine
        from system.constraints import Constraints

        constraints = Constraints.of(stop_token=2, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS, vocab_size=49152)
        self.engine = Engine(folder, "base", constraints, settings)

    def rate(self, adapter: Adapter) -> float:
        """Tokens a second of PROMPTS groups. Without an installed version the engine draws from the base."""
        from system.trajectory import Behaviour, Prompt, Request

        engine, rng = self.engine, np.random.default_rng(0)
        engine.installed = engine.installed or adapter
        forget_prompts(engine)
        started, before = time.perf_counter(), engine.tokens
        for index in range(PROMPTS):
            prompt = Prompt(str(index), tuple(rng.integers(100, 40000, PROMPT_TOKENS).tolist()), (1,))
            engine.add(Request(index, prompt, (Behaviour(),) * SAMPLES, seed=index))
        while engine.busy:
            engine.step()
        return (engine.tokens - before) / (time.perf_counter() - started)

    def install(self, adapter: Adapter) -> Installed:
        return self.engine.install(adapter)

    def log_probs(self, tokens: list[int]) -> np.ndarray:
        """[T - 1] nats, of each token given those before it."""
        import vllm

        params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0.0)
        inputs: Any = [{"prompt_token_ids": tokens}]
        lora = self.engine._loras[-1] if self.engine._loras else None
        output = self.engine._llm.generate(inputs, params, use_tqdm=False, lora_request=lora)[0]
        rows: Any = output.prompt_logprobs
        return np.array([row[token].logprob for row, token in zip(rows[1:], tokens[1:], strict=True)])


# ------------------------------------------------------------------------------------------------- in the main one


@dataclass(frozen=True)
class Update:
    """The same direction at every size, with the learner's log-probs [T - 1] of `tokens` before and after it."""

    tokens: list[int]
    base_logp_T: np.ndarray
    logp_T: dict[float, np.ndarray]
    adapters: dict[float, Adapter]


def first_update(folder: Path) -> Update:
    import torch

    from learner.learner import CANARY_TOKENS
    from learner.policy import Policy
    from system.config import Lora
    from system.constraints import Constraints
    from system.prefix_tree import Packed, PrefixTree
    from system.pretrained import load_tokenizer

    torch.manual_seed(0)
    constraints = Constraints.of(stop_token=2, min_tokens=1, max_tokens=2, vocab_size=49152)
    policy = Policy(folder, Lora(), constraints, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer, model = load_tokenizer(folder), policy.language_model

    def log_probs(tokens: list[int]) -> torch.Tensor:
        hidden = model.hidden([Packed.of(PrefixTree.of([]), tokens)])
        return model.log_probs(hidden, np.arange(len(tokens) - 1), np.array(tokens[1:]))

    def read() -> np.ndarray:
        with torch.no_grad():
            return log_probs(tokens).double().numpy()

    stories = [json.loads(line)["sentences"] for line in (TEXTS / "stories.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = tokenizer(" ".join(itertools.chain.from_iterable(stories)))["input_ids"][:CONTEXT]
    base_logp_T, logp_T = read(), {}
    log_probs(tokenizer((TEXTS / "prompts.txt").read_text(encoding="utf-8"))["input_ids"]).sum().backward()
    for parameter in policy.parameters.values():
        if parameter.grad is not None and not parameter.detach().any():
            parameter.data = parameter.grad.sign()
    config, direction, adapters = policy.adapter_config(), policy.adapter_tensors(), {}
    updates = Adapter.of(0, 0, direction, config, "base").updates().values()
    squares = sum(u.scale**2 * float(((u.b_OR.T @ u.b_OR) * (u.a_RI @ u.a_RI.T)).sum()) for u in updates)
    rms = (squares / sum(u.shape[0] * u.shape[1] for u in updates)) ** 0.5
    for version, size in enumerate(SIZES, start=1):
        tensors = {name: array * np.float32(size / rms if "lora_B" in name else 1) for name, array in direction.items()}
        policy.load_adapter(tensors)
        logp_T[size] = read()
        logp, base_logp = (tuple(values[: CANARY_TOKENS - 1].tolist()) for values in (logp_T[size], base_logp_T))
        canary = Canary(tuple(tokens[:CANARY_TOKENS]), logp, base_logp)
        adapters[size] = Adapter.of(version, version, tensors, config, "base", canary)
    return Update(tokens, base_logp_T, logp_T, adapters)


def arrived(worker: Worker, mode: str, dtype: str, update: Update, base_T: np.ndarray) -> list[Figure]:
    """`base_T` holds the engine's log-probs before any version."""
    figures = []
    for size, adapter in update.adapters.items():
        effective, logp_T = worker("install", adapter).effective_update, worker("log_probs", update.tokens)
        change_T = update.logp_T[size] - update.base_logp_T
        share = float((logp_T - base_T) @ change_T / (change_T @ change_T))
        detail = {
            "effective_update": effective,
            "change_nats_a_token": float(np.abs(change_T).mean()),
            "error_of_the_change": float(np.abs(logp_T - base_T - change_T).mean()),
            "error": float(np.abs(logp_T - update.logp_T[size]).mean()),
            "error_of_the_base": float(np.abs(base_T - update.base_logp_T).mean()),
        }
        figures.append(Figure(f"{mode}, {dtype}: share of an update of {size:g} that arrives", "", [share], detail=detail))
    return figures


def measure(folder: Path, dtype: Literal["float32", "bfloat16"], repeats: int, threads: int, update: Update) -> None:
    modes = {name: mode for name, mode in MODES.items() if dtype == "bfloat16" or mode.get("rounding") != "stochastic"}
    adapter = update.adapters[SIZES[-1]]
    with ExitStack() as stack:
        workers = {}
        for name, mode in modes.items():
            settings = EngineSettings(
                max_model_len=CONTEXT + 32, dtype=dtype, threads=threads, kv_cache_mb=256, canary_tolerance=1e9, **mode
            )  # type: ignore[arg-type]
            workers[name] = stack.enter_context(Worker(Drawing, folder, settings))
            base_T = workers[name]("log_probs", update.tokens)
            if name != "base":
                report(*arrived(workers[name], name, dtype, update, base_T))

        def install(name: str) -> Callable[[], float]:
            return lambda: workers[name]("install", adapter).seconds

        def rate(name: str) -> Callable[[], float]:
            return lambda: workers[name]("rate", adapter)

        installs = in_turns({name: install(name) for name in modes if name != "base"}, 2 * repeats)
        rates = in_turns({name: rate(name) for name in modes}, repeats)
    for mode, seconds in installs.items():
        name, merged = f"{mode}, {dtype}", MODES[mode]["install"] == "merged"
        report(
            ratio(f"{name}, over the base without LoRA, tokens/s", rates[mode], rates["base"], 0.95 if merged else None),
            Figure(f"{name}, install of a version", "s", seconds, at_most=0.3),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    # What a process starts with: its children read it when they import vLLM.
    os.environ.update(engine_environment(arguments.threads, gpu=False))
    folder = locate(Model())
    update = first_update(folder)
    for dtype in arguments.dtypes:
        measure(folder, dtype, arguments.repeats, arguments.threads, update)


if __name__ == "__main__":
    main()
